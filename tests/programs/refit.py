"""What the two ranks of tests/megatron/test_refit.py run: rank 0 trains, rank 1 rolls out, and weights go over."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import megatron_fp32_router
from megatron_fp32_router.lab import refit


def turn(setting: str) -> None:
    """ "all" or "buffers": the plugin with that PROTECT; "off": without it."""
    megatron_fp32_router.disable()
    if setting != "off":
        megatron_fp32_router.enable(protect=setting)


def hand_over(recipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Every case "SENDER RECEIVER" twice, from one plan: what each rank's model held before and holds afterwards."""
    rank = dist.get_rank()
    alone = refit.groups()
    found: dict[str, Any] = {}
    for case in arguments["cases"]:
        refit.forget_plans()
        turn(case.split()[rank])
        mine = refit.model(recipe, rank, alone)
        other = refit.other_side(mine)
        found[case] = [refit.state(mine)]
        for _ in range(2):
            if rank == 0:
                with torch.no_grad():
                    for parameter in mine.parameters():
                        parameter.mul_(1.01)
            refit.hand_over(mine, other)
            found[case].append(refit.state(mine))
    return found
