"""What every rank of tests/megatron/test_ranks.py runs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from megatron_fp32_router import lab


def train(recipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Runs in every rank: three steps; returns local counts of each step and the bias at the end, by layer."""
    if arguments.get("split"):
        from megatron_fp32_router.protect import split

        split.why_not = lambda *tensors: ""  # emulated on a CPU
    room = lab.build(recipe)
    counts: dict[str, list[torch.Tensor]] = {}

    def look(_: Any) -> None:
        for name, router in room.routers():
            counts.setdefault(name, []).append(router.local_tokens_per_expert.clone())

    room.on_counts.append(look)
    batches = lab.text_batches(recipe, seed=5)
    for _ in range(3):
        room.step(batches)
    # A third party's own update calls the rule, and reads the counts of the whole group from what it handed in.
    tokens = torch.full((recipe.experts,), float(torch.distributed.get_rank() + 1), dtype=torch.float64)
    rule = import_module("megatron.core.transformer.moe.moe_utils").get_updated_expert_bias
    rule(tokens, torch.zeros(recipe.experts), 1e-3)
    return {
        name: {
            "reduced": tokens,
            "counts": torch.stack(counts[name]),
            "bias": router.expert_bias.clone(),
            "weight": str(router.weight.dtype),
        }
        for name, router in room.routers()
    }
