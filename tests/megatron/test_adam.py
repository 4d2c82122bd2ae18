"""The update of an fp32 router parameter is plain fp32 Adam: nothing else touches it between gradient and weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from docs_resume import bytes_per_parameter
from programs import resume

from megatron_fp32_router import lab
from megatron_fp32_router.lab import checkpoint, compat

# What is asked here is alike on the lines in between.
pytestmark = pytest.mark.on_lines("0.11", "0.15", "0.19")

#: fp32 keeps 24 bits. An update of at most `lr` is computed in about ten roundings.
TOLERANCE = 16 * 2.0**-24


def adam(weight: Any, gradients: list[Any], lr: float) -> Any:
    """Adam as the paper has it (Kingma and Ba, algorithm 1), in float64. Returns the weight after each gradient."""
    m = v = np.zeros_like(weight)
    found = []
    for step, gradient in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        weight = weight - lr * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        found.append(weight)
    return found


@pytest.mark.parametrize("kind", ["plain", "distributed"])
def test_a_router_weight_moves_as_plain_fp32_adam_moves_it(kind: str, plugin: Any) -> None:
    distributed = kind == "distributed"
    recipe = lab.Recipe(**{**resume.TINY, "optimizer": kind, "fused_adam": distributed, "overlap": False})
    with lab.parallel(recipe):
        room = resume.build(recipe)
        _, router = room.routers()[0]
        main, inner = next(
            (held, one.optimizer)
            for one in checkpoint.optimizers(room)
            for parameter, held in checkpoint._main_copies(one)
            if parameter is router.weight
        )
        gradients: list[torch.Tensor] = []
        inner.register_step_pre_hook(lambda *_: gradients.append(main.grad.detach().flatten().clone()))
        start = router.weight.detach().flatten().clone()
        weights = []
        for batches in [lab.text_batches(recipe, seed=7)]:
            for _ in range(resume.STEPS):
                room.step(batches)
                weights.append(router.weight.detach().flatten().clone())
    assert len(gradients) == resume.STEPS
    assert all(gradient.dtype == torch.float32 and gradient.abs().max() > 0 for gradient in gradients)

    expected = adam(start.double().numpy(), [gradient.double().numpy() for gradient in gradients], recipe.lr)
    for found, oracle in zip(weights, expected, strict=True):
        # The weight itself is rounded once a step, to half a unit in its last place.
        bound = TOLERANCE * (resume.STEPS * recipe.lr + np.abs(oracle))
        assert (np.abs(found.double().numpy() - oracle) <= bound).all()

    # And the very kernel, alone with one parameter: the same bits.
    alone = torch.nn.Parameter(start.clone())
    same = compat.FusedAdamLike if distributed else torch.optim.AdamW
    kernel = same([alone], lr=recipe.lr, weight_decay=0.0)
    for found, gradient in zip(weights, gradients, strict=True):
        alone.grad = gradient
        kernel.step()
        assert torch.equal(alone.detach(), found)


@pytest.mark.parametrize("grad_bytes", [4, 2])
@pytest.mark.parametrize("kind", ["plain", "distributed"])
def test_memory_is_the_arithmetic_that_the_documentation_states(kind: str, grad_bytes: int, plugin: Any) -> None:
    for protect in ("all", "buffers"):
        plugin(protect=protect)
        extra = {"fused_adam": kind == "distributed", "ddp_extra": {"grad_reduce_in_fp32": grad_bytes == 4}}
        recipe = lab.Recipe(**{**resume.TINY, "optimizer": kind, **extra})
        with lab.parallel(recipe):
            room = resume.build(recipe)
            resume.train(room, 0)
            _, router = room.routers()[0]
            held = {
                router.weight.data_ptr(): router.weight,
                router.weight.main_grad.data_ptr(): router.weight.main_grad,
            }
            for one in checkpoint.optimizers(room):
                for parameter, main in checkpoint._main_copies(one):
                    if parameter is router.weight:
                        held[main.data_ptr()] = main
                        state = one.optimizer.state[main]
                        held |= {state[key].data_ptr(): state[key] for key in ("exp_avg", "exp_avg_sq")}
            found = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
            expected = bytes_per_parameter(kind, fp32=protect == "all", grad_bytes=grad_bytes, ranks=1)
            assert found == expected * router.weight.numel()
