"""Megatron-Bridge's recipes: none is refused the optimizer that it asks for."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from bootstrap import ensure_emerging_optimizers, ensure_transformer_engine

RELEASE = "0.19.2"


@pytest.fixture
def recipes(run: Callable[..., Any]) -> Callable[[bool], dict[str, Any]]:
    """`recipes(plugin)`: recipe -> what became of it."""
    variables = {
        "PRETENCE": "cpu_program",
        "TRANSFORMER_ENGINE": str(ensure_transformer_engine()),
        "EMERGING_OPTIMIZERS": os.pathsep.join(map(str, ensure_emerging_optimizers())),
    }

    def start(plugin: bool) -> dict[str, Any]:
        # Without the plugin too the program takes TransformerEngine's kernels from its laboratory.
        off = {} if plugin else {"MEGATRON_FP32_ROUTER": "0"}
        seen: dict[str, Any] = run("run_bridge_recipes", RELEASE, plugin, **variables, **off).seen["recipes"]
        return seen

    return start


def test_no_recipe_is_stopped(recipes: Any) -> None:
    on = recipes(True)
    # One says itself that it is not to be had; two read a tokenizer, and are dense.
    assert len([name for name, one in on.items() if "not made" in one]) <= 3
    assert {name: one for name, one in on.items() if "stopped" in one} == {}
    went = [one for one in on.values() if "optimizers" in one]
    assert len(went) > 280
    assert {kind for one in went for kind in one["optimizers"]} >= {"FusedAdam", "TensorParallelMuon"}


def test_their_optimizers_move_fp32_routers_unless_an_adapter_is_trained(recipes: Any) -> None:
    on, off = recipes(True), recipes(False)
    for name in (name for name, one in on.items() if "dtypes" in one):
        assert on[name]["dtypes"]["weight"] == ["float32"], name
        assert on[name]["moved"] == [not on[name]["adapter"]], name
        assert off[name]["dtypes"]["weight"] == ["bfloat16"], name
        assert off[name]["optimizers"] == on[name]["optimizers"], name
