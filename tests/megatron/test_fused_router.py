"""TransformerEngine's fused router (--moe-router-fusion) in a training, on kernels of the same arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bootstrap import ensure_transformer_engine

import megatron_fp32_router
from megatron_fp32_router import lab
from megatron_fp32_router.lab import kernels, transformer_engine

# What is asked here is alike on the lines in between.
pytestmark = pytest.mark.on_lines("0.14", "0.16", "0.19")

FUSED = {"router_dtype": "fp32", "extra": {"moe_router_fusion": True}}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The fused kernels that were called, by name, in a Megatron whose routers have TransformerEngine."""
    made: list[str] = []

    def noting(name: str) -> Any:
        kernel = getattr(kernels, name)
        return staticmethod(lambda *args, **kwargs: made.append(name) or kernel(*args, **kwargs))

    for bound, name in (
        ("fused_topk_with_score_function_fwd", "fused_topk"),
        ("fused_topk_with_score_function_bwd", "fused_topk_backward"),
        ("fused_score_for_moe_aux_loss_fwd", "fused_scores"),
        ("fused_moe_aux_loss_fwd", "fused_aux_loss"),
        ("fused_moe_aux_loss_fwd_graph_safe", "fused_aux_loss"),
        ("generic_gemm", "gemm"),
    ):
        monkeypatch.setattr(transformer_engine._Compiled, bound, noting(name))
    with transformer_engine.router_in_use(ensure_transformer_engine()):
        yield made


def train(build: Any, steps: int = 6, **fields: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, and every router tensor afterwards."""
    room = build(**{**FUSED, **fields})
    batches = [batch for _, batch in zip(range(2), lab.text_batches(room.recipe, seed=3), strict=False)]
    losses = [room.step(batches) for _ in range(steps)]
    tensors = {f"{n}.{key}": t.clone() for n, r in room.routers() for key, t in r.state_dict().items() if t is not None}
    return losses, tensors


def test_it_trains_off_and_on_and_with_the_plugin_no_router_product_is_transformer_engines(
    build: Any, calls: list[str]
) -> None:
    off, tensors = train(build)
    assert off[-1] < off[0]
    assert {"fused_topk", "fused_topk_backward", "gemm"} <= set(calls)
    assert any(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    calls.clear()
    megatron_fp32_router.enable()
    try:
        on, tensors = train(build)
        again, same = train(build)
    finally:
        megatron_fp32_router.disable()
    assert {"fused_topk", "fused_topk_backward"} <= set(calls)
    assert "gemm" not in calls
    assert on == pytest.approx(off, abs=0.05)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values() if tensor.is_floating_point())
    assert on == again
    assert all(torch.equal(tensor, same[name]) for name, tensor in tensors.items())


def test_with_the_plugin_fused_routing_chooses_and_counts_as_routing_in_torch_does(
    build: Any, calls: list[str], plugin: Any
) -> None:
    fused, tensors = train(build)
    assert "fused_topk" in calls
    calls.clear()
    plain, others = train(build, extra={})
    assert calls == []
    # TransformerEngine's scores go through the bias and back, so probabilities differ in the last bits.
    assert fused == pytest.approx(plain, abs=2e-3)
    for name, tensor in tensors.items():
        if name.endswith("expert_bias"):
            assert (tensor == others[name]).float().mean() > 0.8


@pytest.mark.parametrize("load_balancing", ["aux_loss", "seq_aux_loss"])
def test_auxiliary_losses_are_fused_too(load_balancing: str, build: Any, calls: list[str], plugin: Any) -> None:
    losses, _ = train(build, load_balancing=load_balancing, expert_bias=False)
    assert {"fused_scores", "fused_aux_loss"} <= set(calls)
    assert losses[-1] < losses[0]
