"""verl's router replay replaces TopKRouter.routing as a whole: what it counts, and what it replays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: verl pins it.
RELEASE = "0.18.2"


def test_verl_counts_exactly_and_replays_what_it_recorded(run: Callable[..., Any]) -> None:
    on = run("run_verl", RELEASE, True, PRETENCE="cpu_program")
    seen = on.seen
    assert seen["routing"] == "router_replay_patch"  # theirs ran
    assert seen["replayed"]
    assert seen["dtypes"] == {
        "weight": ["float32"],
        "expert_bias": ["float32"],
        "local_tokens_per_expert": ["float64"],
    }
    assert seen["bias"] == seen["exact"] != seen["started"]
    assert seen["gradients"] == ["torch.float32"]
    assert on.said("2 routers: weight float32 x2, local_tokens_per_expert float64 x2, expert_bias float32 x2")
    # None of our functions sits where theirs does.
    assert on.displaced() == set()
    assert on.state("gating") == on.state("bias-update") == "applied"


def test_without_the_plugin_verl_counts_in_bf16(run: Callable[..., Any]) -> None:
    seen = run("run_verl", RELEASE, False, PRETENCE="cpu_program").seen
    assert seen["replayed"]
    assert seen["dtypes"]["weight"] == seen["dtypes"]["local_tokens_per_expert"] == ["bfloat16"]
    assert seen["bias"] != seen["exact"]
