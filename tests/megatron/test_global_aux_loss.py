"""The counters of the global auxiliary loss (0.15 and later), in a real training: exact with the plugin."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest

from megatron_fp32_router import lab

# About 1,000 tokens an expert and step, in four micro-batches. Without expert_bias the experts that tokens are sent
# to are those that this loss counts.
BUSY = {"seq_length": 256, "micro_batch": 4, "micro_batches": 4, "load_balancing": "global_aux_loss"}


def counted_and_true(build: Any, steps: int = 2) -> list[tuple[np.ndarray, float, np.ndarray]]:
    """(global_tokens_per_expert, ga_steps, true counts) of every router at the end of every step's backward."""
    room = build(expert_bias=False, **BUSY)
    found: list[tuple[np.ndarray, float, np.ndarray]] = []
    true: dict[str, np.ndarray] = {}

    def add(routing: Any) -> None:
        columns = routing.routing_map.numpy().astype(np.int64).sum(axis=0)
        true[routing.name] = true.get(routing.name, 0) + columns

    def look(_: Any) -> None:
        for name, router in room.routers():
            counters = router.global_tokens_per_expert.double().numpy().copy()
            found.append((counters, float(router.ga_steps), true.pop(name)))

    room.on_counts.append(look)
    with room.record_routing(add):
        for _ in range(steps):
            room.step(lab.text_batches(room.recipe, seed=1))
            for _, router in room.routers():
                assert not router.global_tokens_per_expert.any()
                assert not router.ga_steps.any()
    assert len(found) == steps * room.recipe.layers
    return found


@pytest.mark.shows("D9")
def test_upstream_rounds_the_tokens_that_the_loss_is_computed_from(build: Any) -> None:
    assert any((counters != true).any() for counters, _, true in counted_and_true(build))


@pytest.mark.repairs("D9")
def test_the_loss_is_computed_from_exact_counts(build: Any, plugin: Any) -> None:
    for counters, micro_batches, true in counted_and_true(build):
        assert true.sum() == 256 * 4 * 4 * 2
        assert (counters == true).all()
        assert micro_batches == 4


def test_the_scale_of_a_loss_ends_with_the_groups_of_its_training() -> None:
    before = scaler().main_loss_backward_scale
    recipe = lab.Recipe(load_balancing="aux_loss")
    with lab.parallel(recipe):
        lab.build(recipe).step(lab.text_batches(recipe, seed=1))
        assert scaler().main_loss_backward_scale is not before
    after = scaler().main_loss_backward_scale
    assert after is None if before is None else bool(after == before)


def scaler() -> Any:
    return import_module("megatron.core.transformer.moe.moe_utils").MoEAuxLossAutoScaler
