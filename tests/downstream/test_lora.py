"""Adapters of routers: Megatron-Bridge goes around TopKRouter.forward, mcore-bridge (ms-swift) swaps its gating."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: mcore-bridge recommends it.
RELEASE = "0.18.2"


def test_mcore_bridge_adds_to_logits_that_are_fp32_and_exact(run: Callable[..., Any]) -> None:
    on = run("run_mcore_bridge", RELEASE, True, PRETENCE="cpu_program")
    seen, training = on.seen, on.seen["training"]
    assert seen["routers"] == 2
    assert seen["dtypes"]["weight"] == seen["dtypes"]["expert_bias"] == ["float32"]
    assert seen["dtypes"]["local_tokens_per_expert"] == ["float64"]
    assert seen["logits"] == "torch.float32"
    assert seen["exact"]
    assert seen["swapped"]  # an adapter that adds nothing changes nothing: ours ran inside theirs
    assert training["bias"] == training["exact"] != training["started"]
    assert on.said("2 routers: weight float32 x2")
    # It puts back what it found.
    assert on.state("gating") == "applied"
    # Its repair of padding masks lies on ours.
    assert on.displaced() == {"padding-mask"}
    assert on.said("mcore_bridge.patcher")


def test_without_the_plugin_its_logits_are_rounded(run: Callable[..., Any]) -> None:
    seen = run("run_mcore_bridge", RELEASE, False, PRETENCE="cpu_program").seen
    assert seen["dtypes"]["weight"] == ["bfloat16"]
    assert seen["logits"] == "torch.bfloat16"
    assert not seen["exact"]
    assert seen["training"]["bias"] != seen["training"]["exact"]
