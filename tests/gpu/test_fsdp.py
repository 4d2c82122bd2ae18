"""FSDP with fp32 routers on one GPU, over NCCL: torch's and Megatron's."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

import megatron_fp32_router
from megatron_fp32_router import lab

RECIPE: dict[str, Any] = {"layers": 1, "overlap": False, "fused_adam": True, "clip_grad": 0.0}
STEPS = 3


@pytest.mark.parametrize(("wrapper", "optimizer"), [("fsdp2", "plain"), ("megatron_fsdp", "distributed")])
def test_routers_move_as_under_ddp(wrapper: str, optimizer: str, make: Any, monkeypatch: Any) -> None:
    """Within what atomic additions on a GPU leave open; a mixture of two dtypes in one collective is far off."""
    if wrapper == "megatron_fsdp" and find_spec("megatron.core.distributed.fsdp") is None:
        pytest.skip("this Megatron has no Megatron-FSDP (0.14 and later have it): IT DID NOT RUN")
    monkeypatch.setenv("MEGATRON_FP32_ROUTER_UNTESTED", "allow")
    megatron_fp32_router.enable()
    try:
        found = []
        for kind in ("ddp", wrapper):
            room = make(lab.build, **RECIPE, optimizer=optimizer, wrapper=kind)
            batches = lab.text_batches(room.recipe, seed=7)
            losses = [room.step(batches) for _ in range(STEPS)]
            weights = {name.replace("module.", ""): whole(router.weight) for name, router in room.routers()}
            biases = [router.expert_bias.clone() for _, router in room.routers()]
            found.append((losses, weights, biases))
    finally:
        megatron_fp32_router.disable()
    (losses, weights, biases), (their_losses, their_weights, their_biases) = found
    assert their_losses == pytest.approx(losses, rel=1e-3)
    for name, weight in weights.items():
        assert their_weights[name].dtype == weight.dtype == torch.float32
        # Adam moves a weight by at most the learning rate, 1e-3, in each step.
        assert (weight - their_weights[name]).abs().mean() < 1e-4, name
    for bias, other in zip(biases, their_biases, strict=True):
        assert bias.dtype == other.dtype == torch.float32
        # A token that goes elsewhere moves an entry by twice the rate of 1e-3; most stay.
        assert ((bias - other).abs() < 1e-6).double().mean() > 0.5


def whole(parameter: torch.Tensor) -> torch.Tensor:
    full = getattr(parameter, "full_tensor", None)
    return (parameter if full is None else full()).detach().clone()
