"""What every rank of tests/megatron/test_ranks.py runs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from megatron_fp32_router import lab
from megatron_fp32_router.lab import checkpoint

#: In how many pieces a rank counts its share of a step's tokens, as micro-batches do.
PIECES = 64


def train(recipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Runs in every rank: three steps; returns local counts of each step and the bias at the end, by layer.

    With `totals` (int64 [steps, experts]) it then goes on with counts of the test's choosing, see `split`.
    """
    fresh = emulate_split_products() if arguments.get("split_products") else []
    room = lab.build(recipe)
    counts: dict[str, list[torch.Tensor]] = {}

    def look(_: Any) -> None:
        for name, router in room.routers():
            counts.setdefault(name, []).append(router.local_tokens_per_expert.clone())

    room.on_counts.append(look)
    batches = lab.text_batches(recipe, seed=5)
    for _ in range(3):
        room.step(batches)
    checkpoint.gather(room)
    found = {
        name: {
            "layer": router.layer_number,
            "counts": torch.stack(counts[name]),
            "bias": router.expert_bias.clone(),
            "weight": router.weight.detach().clone(),
            "fresh": fresh,
        }
        for name, router in room.routers()
    }
    # A third party's own update calls the rule, and reads the counts of the whole group from what it handed in.
    tokens = torch.full((recipe.experts,), float(torch.distributed.get_rank() + 1), dtype=torch.float64)
    rule = import_module("megatron.core.transformer.moe.moe_utils").get_updated_expert_bias
    rule(tokens, torch.zeros(recipe.experts), 1e-3)
    room.on_counts.remove(look)
    after = split(room, arguments["totals"])
    return {name: {**values, "reduced": tokens, "split": after[name]} for name, values in found.items()}


def emulate_split_products() -> list[bool]:
    """Use split products on this CPU; returns a list that tells of each one whether it is that of its weight."""
    from megatron_fp32_router.gating import choose, split, split_cache

    fresh: list[bool] = []
    parts_of = split_cache.parts_of

    def checked(weight: torch.Tensor, **how: bool) -> torch.Tensor:
        parts = parts_of(weight, **how)
        fresh.append(torch.equal(parts, split.split_weight(weight)))
        return parts

    choose.why_not = lambda *tensors: ""  # type: ignore[assignment]
    split_cache.parts_of = checked  # type: ignore[assignment]
    return fresh


def split(room: Any, totals: torch.Tensor) -> dict[str, torch.Tensor]:
    """Train on with counts that add up, over the ranks of a layer, to `totals`; returns the biases afterwards.

    Everything but the counts is real: they are put in after the backward pass, before finalize_model_grads. Shares
    are uneven, and every rank adds its own in pieces. Layer n gets the totals rotated by n experts.
    """
    state = import_module("megatron.core.parallel_state")
    group = state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    rank, size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    steps = iter(totals)

    def put_in(_: Any) -> None:
        total = next(steps)
        for _, router in room.routers():
            router.local_tokens_per_expert.zero_()
            mine = share(total.roll(router.layer_number), rank, size)
            for piece in range(PIECES):
                router.local_tokens_per_expert += share(mine, piece, PIECES)

    for _, router in room.routers():
        router.expert_bias.fill_(room.recipe.bias_start)
    room.on_counts.append(put_in)
    batches = lab.text_batches(room.recipe, seed=6)
    for _ in totals:
        room.step_without_optimizer(batches)
    room.on_counts.remove(put_in)
    return {name: router.expert_bias.clone() for name, router in room.routers()}


def share(total: torch.Tensor, part: int, parts: int) -> torch.Tensor:
    """Part `part` of `total` (int64) in `parts` uneven integers that add up to it."""
    weights = torch.arange(parts) % 5 + 7
    shares = total.unsqueeze(0) * weights.unsqueeze(1) // weights.sum()
    shares[-1] += total - shares.sum(0)
    return shares[part]
