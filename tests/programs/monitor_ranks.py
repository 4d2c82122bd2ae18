"""What every rank of tests/test_monitor_ranks.py runs."""

from __future__ import annotations

from typing import Any

import torch

from megatron_fp32_router import lab, monitor


def train(recipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Train under the monitor and dump what an independent recomputation needs, by layer number and step.

    `counts`: int64, tokens per expert of this rank, from recorded routing maps. `hidden`: of the first micro-batch.
    `weight`, `bias`: as they were when that was routed.
    """
    room = lab.build(recipe)
    dumped: dict[int, dict[int, dict[str, torch.Tensor]]] = {}
    step = 1

    def look(routing: Any) -> None:
        router = routing.router
        layer = dumped.setdefault(router.layer_number, {}).setdefault(step, {})
        counts = routing.routing_map.sum(dim=0)
        if "counts" in layer:
            layer["counts"] += counts
            return
        layer["counts"], layer["hidden"] = counts, routing.hidden.reshape(-1, recipe.hidden).float()
        layer["weight"] = router.weight.detach().clone()
        if router.expert_bias is not None:
            layer["bias"] = router.expert_bias.detach().clone()

    batches = lab.text_batches(recipe, seed=5)
    with room.record_routing(look):
        for _ in range(arguments["steps"]):
            room.step(batches)
            step += 1
            if step == arguments.get("cast_after"):
                room.on_counts.append(lambda room: _cast_the_last_router(room, arguments["cast_on"]))
    return {"dumped": dumped, "latest": monitor.latest()}


def _cast_the_last_router(room: Any, rank: int) -> None:
    """What a third party's code may do behind everybody's back; after the forward, whose gating would notice."""
    if torch.distributed.get_rank() == rank:
        _, router = room.routers()[-1]
        router.weight.data = router.weight.data.bfloat16()
