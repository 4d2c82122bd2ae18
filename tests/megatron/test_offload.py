"""CPU offload of the optimizer (HybridDeviceOptimizer): fp32 router parameters are trained, saved and loaded."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from programs.unrepaired import upstreams

from megatron_fp32_router import lab
from megatron_fp32_router.lab import cpu

pytestmark = pytest.mark.since("0.12")

#: 0: all on the GPU. 0.001: the first router on the CPU, the rest on the GPU. 1: all on the CPU.
FRACTIONS = (0.0, 0.001, 0.5, 1.0)
LR, BETAS, EPS = 1e-3, (0.9, 0.999), 1e-8


@pytest.fixture
def offloaded(build: Any) -> Iterator[Callable[[float], lab.Lab]]:
    """`offloaded(fraction)`: a model whose optimizer keeps that part of its parameters in host memory."""
    with contextlib.ExitStack() as stack:

        def make(fraction: float) -> lab.Lab:
            if not cpu._replaced or cpu._replaced[-1][1] != "_get_sub_optimizer_param_groups":
                stack.enter_context(cpu.offloading())
            return build(
                optimizer="distributed",
                overlap=False,
                seq_length=16,
                micro_batches=1,
                clip_grad=0.0,
                optimizer_extra={
                    "optimizer_cpu_offload": True,
                    "optimizer_offload_fraction": fraction,
                    "use_precision_aware_optimizer": True,
                    "pin_cpu_grads": False,
                },
            )

        yield make


def hybrid(room: lab.Lab) -> Any:
    (optimizer,) = getattr(room.optimizer, "chained_optimizers", [room.optimizer])
    return optimizer.optimizer


def weights(room: lab.Lab) -> dict[str, torch.Tensor]:
    return {name: router.weight.detach().clone() for name, router in room.routers()}


def train(room: lab.Lab, steps: int, seed: int) -> list[float]:
    batches = lab.text_batches(room.recipe, seed=seed)
    return [room.step(batches) for _ in range(steps)]


def test_upstream_cannot_take_fp32_router_parameters(offloaded: Any, plugin: Any) -> None:
    with upstreams("optimizer-mixed-groups"), pytest.raises(ValueError, match="non-leaf"):
        offloaded(1.0)


def test_upstream_never_updates_fp32_parameters_that_stay_on_the_gpu(offloaded: Any, plugin: Any) -> None:
    with upstreams("offload-gradients"):
        room = offloaded(0.0)
        before = weights(room)
        train(room, 2, seed=1)
    assert all(torch.equal(before[name], weight) for name, weight in weights(room).items())


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_an_offloaded_router_weight_is_updated_as_adam_would(fraction: float, offloaded: Any, plugin: Any) -> None:
    room = offloaded(fraction)
    routers = dict(room.routers())
    assert {router.weight.dtype for router in routers.values()} == {torch.float32}
    start = {name: router.weight.detach().double().numpy().copy() for name, router in routers.items()}
    same = {name: router.weight.detach().clone().view(-1).requires_grad_() for name, router in routers.items()}
    kernel = torch.optim.AdamW(same.values(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)
    moments = {name: (np.zeros_like(value), np.zeros_like(value)) for name, value in start.items()}
    batches = lab.text_batches(room.recipe, seed=1)
    for step in range(1, 4):
        room.step_without_optimizer(batches)
        for name, router in routers.items():
            same[name].grad = router.weight.main_grad.detach().clone().view(-1)
            grad = router.weight.main_grad.double().numpy()
            first = BETAS[0] * moments[name][0] + (1 - BETAS[0]) * grad
            second = BETAS[1] * moments[name][1] + (1 - BETAS[1]) * grad**2
            moments[name] = first, second
            root = np.sqrt(second / (1 - BETAS[1] ** step)) + EPS
            start[name] -= LR * first / (1 - BETAS[0] ** step) / root
        room.optimizer.step()
        kernel.step()
    for name, router in routers.items():
        assert torch.equal(router.weight.view(-1), same[name])  # the same kernel: bit for bit
        # fp32 spacing at 0.1 is 7e-9, three steps of 1e-3.
        np.testing.assert_allclose(router.weight.detach().double().numpy(), start[name], rtol=0, atol=5e-8)


def saved(room: lab.Lab) -> tuple[Any, Any]:
    """What torch would write of model and optimizer."""
    return copy.deepcopy((model_state(room), hybrid(room).state_dict()))


def model_state(room: lab.Lab) -> dict[str, torch.Tensor]:
    return {name: value for name, value in room.chunks[0].state_dict().items() if value is not None}


def load(room: lab.Lab, state: tuple[Any, Any]) -> None:
    room.chunks[0].load_state_dict(state[0], strict=False)
    hybrid(room).load_state_dict(state[1])


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_a_resumed_run_goes_on_bit_for_bit(fraction: float, offloaded: Any, plugin: Any) -> None:
    room = offloaded(fraction)
    train(room, 3, seed=1)
    state = saved(room)
    losses = train(room, 3, seed=2)
    params, inner = saved(room)
    moments = inner["state"]

    room = offloaded(fraction)
    load(room, state)
    assert train(room, 3, seed=2) == losses
    for name, value in model_state(room).items():
        assert torch.equal(value, params[name]), name
    again = hybrid(room).state_dict()["state"]
    assert again.keys() == moments.keys()
    for index, values in moments.items():
        assert {"exp_avg", "exp_avg_sq", "master_param"} <= values.keys()
        for name, value in values.items():
            assert torch.equal(again[index][name], value), (index, name)
