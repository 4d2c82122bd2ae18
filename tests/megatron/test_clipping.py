"""Norms and clipping of gradients in two dtypes, by the kernels that TransformerEngine and apex have for it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from bootstrap import ensure_transformer_engine

from megatron_fp32_router import lab
from megatron_fp32_router.lab import cpu, kernels, transformer_engine
from megatron_fp32_router.optimizers.clipping.repair import one_call_a_dtype

# What is asked here is alike on the lines in between.
pytestmark = pytest.mark.on_lines("0.11", "0.12", "0.16", "0.17", "0.18", "0.19")


@pytest.fixture
def engine() -> Iterator[Any]:
    """Megatron's optimizers with TransformerEngine's; its Python, and kernels of the same arithmetic."""
    with transformer_engine.in_use(ensure_transformer_engine()) as optimizers:
        yield optimizers


@pytest.fixture
def clip_grads(engine: Any) -> Iterator[Any]:
    """Megatron's module, and a rank alone."""
    with lab.parallel(lab.Recipe()):
        yield import_module("megatron.core.optimizer.clip_grads")


def parameters(*dtypes: torch.dtype) -> list[torch.Tensor]:
    """Parameters with a decoupled gradient each, of so many dtypes; every tenth element of it is zero."""
    found = []
    memory = {dtype: torch.randn(1000, generator=torch.Generator().manual_seed(1)).to(dtype) for dtype in set(dtypes)}
    for place, dtype in enumerate(dtypes):
        param = torch.zeros(100, dtype=dtype)
        # Out of one buffer, as Megatron's gradients are.
        param.decoupled_grad = memory[dtype][100 * place : 100 * place + 100]
        param.decoupled_grad[::10] = 0
        found.append(param)
    return found


def grads(params: list[torch.Tensor]) -> list[torch.Tensor]:
    return [param.decoupled_grad for param in params]


def norm(clip_grads: Any, params: list[torch.Tensor]) -> float:
    return float(clip_grads.get_grad_norm_fp32(grads(params), grad_stats_parallel_group=None))


def exact(tensors: list[torch.Tensor]) -> float:
    return torch.cat([tensor.double() for tensor in tensors]).norm().item()


MIXED = (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16)


def test_upstream_reads_bf16_gradients_as_fp32(clip_grads: Any) -> None:
    params = parameters(*MIXED)
    before = [grad.clone() for grad in grads(params)]
    assert norm(clip_grads, params) != pytest.approx(exact(grads(params)), rel=1e-3)
    clip_grads.clip_grad_by_total_norm_fp32(params, 1.0, torch.tensor([4.0]) if has_tensors(clip_grads) else 4.0, True)
    # Two of them, taken for one fp32 number: the first is its lower half, which no product moves by a factor.
    assert not torch.equal(params[1].decoupled_grad, (before[1].float() * 0.25).bfloat16())


def has_tensors(clip_grads: Any) -> bool:
    """Whether this release leaves the norm on the device."""
    return hasattr(clip_grads, "multi_tensor_scale_tensor_impl")


def test_the_norm_over_two_dtypes_is_that_of_fp64_and_clipping_scales_each_in_its_own(
    clip_grads: Any, plugin: Any
) -> None:
    for dtypes in (MIXED, MIXED[1:], (torch.float32,), (torch.bfloat16,)):
        params = parameters(*dtypes)
        before = [grad.clone() for grad in grads(params)]
        found = clip_grads.get_grad_norm_fp32(grads(params), grad_stats_parallel_group=None)
        assert float(found) == pytest.approx(exact(before), rel=1e-6)
        assert isinstance(found, torch.Tensor) == has_tensors(clip_grads)
        clip_grads.clip_grad_by_total_norm_fp32(params, 1.0, found, True)
        factor = torch.tensor(1.0, dtype=torch.float64) / (float(found) + 1.0e-6)
        for grad, old in zip(grads(params), before, strict=True):
            assert grad.dtype == old.dtype
            torch.testing.assert_close(grad.double(), old.double() * factor, rtol=2**-8, atol=0)
            if grad.dtype == torch.float32:
                torch.testing.assert_close(grad.double(), old.double() * factor, rtol=1e-6, atol=0)
        # Small enough: nothing is scaled.
        params = parameters(*dtypes)
        clip_grads.clip_grad_by_total_norm_fp32(params, 1e6, found, True)
        assert all(torch.equal(grad, old) for grad, old in zip(grads(params), before, strict=True))


def test_zeros_are_counted_in_every_dtype(clip_grads: Any, plugin: Any) -> None:
    assert clip_grads.count_zeros_fp32(parameters(*MIXED), None, use_decoupled_grad=True) == 40


def test_gradients_of_one_dtype_go_through_as_they_came(clip_grads: Any, plugin: Any) -> None:
    calls = []

    def kernel(*args: Any) -> Any:
        calls.append(args)
        return torch.ones(1), None

    (tensors,) = lists = [grads(parameters(torch.bfloat16, torch.bfloat16))]
    flag = torch.zeros(1, dtype=torch.int)
    assert clip_grads.multi_tensor_applier(kernel, flag, lists, False)[0].item() == 1
    ((_, given_flag, given, per_tensor),) = calls
    assert given is lists
    assert given[0] is tensors
    assert given_flag is flag
    assert per_tensor is False
    assert clip_grads.multi_tensor_applier(kernel, flag, [[]], False)[0].item() == 1
    # Two dtypes: a call for each, and the norms joined where they are.
    norm, _ = clip_grads.multi_tensor_applier(kernel, flag, [grads(parameters(*MIXED))], False)
    assert [[grad.dtype for grad in call[2][0]] for call in calls[2:]] == [[torch.float32] * 2, [torch.bfloat16] * 2]
    torch.testing.assert_close(norm, torch.tensor([2.0**0.5]))


def test_the_real_applier_of_transformer_engine_is_understood(engine: Any) -> None:
    """An object, where Megatron has a function; it returns nothing when no tensor has an element."""
    applier = one_call_a_dtype(engine.multi_tensor_applier)
    flag = torch.zeros(1, dtype=torch.int)
    empty = torch.zeros(0, dtype=torch.bfloat16)
    tensors = grads(parameters(*MIXED))
    for more in ([], [empty]):
        found, _ = applier(kernels.l2norm, flag, [[*tensors, *more]], False)
        assert found.item() == pytest.approx(exact(tensors), rel=1e-6)
    assert applier(kernels.l2norm, flag, [[torch.zeros(0), empty]], False) is None


@pytest.mark.since("0.12")
def test_an_offloaded_optimizer_clips_bf16_and_fp32_gradients(engine: Any, plugin: Any, build: Any) -> None:
    extra = {"optimizer_cpu_offload": True, "use_precision_aware_optimizer": True, "pin_cpu_grads": False}
    with cpu.offloading():
        room = build(
            optimizer="distributed",
            overlap=False,
            seq_length=16,
            micro_batches=1,
            clip_grad=1e-3,
            ddp_extra={"grad_reduce_in_fp32": False},
            optimizer_extra=extra,
        )
        room.step_without_optimizer(lab.text_batches(room.recipe, seed=1))
        found = [p.main_grad.flatten() for p in room.chunks[0].parameters()]
        assert {grad.dtype for grad in found} == {torch.float32, torch.bfloat16}
        expected = exact(found)
        before = {name: router.weight.main_grad.clone() for name, router in room.routers()}
        _, norm, _ = room.optimizer.step()
    assert float(norm) == pytest.approx(expected, rel=1e-6)
    for name, router in room.routers():
        torch.testing.assert_close(
            router.weight.main_grad.double(), before[name].double() * 1e-3 / expected, rtol=1e-5, atol=0
        )
