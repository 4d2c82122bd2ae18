"""The precision-aware optimizer saved and loaded across settings of the plugin, in one process for each rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from programs import resume

from megatron_fp32_router import lab
from megatron_fp32_router.lab import checkpoint


def turned_on(recipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Save every case in its formats without the plugin, load with it: "case format" -> (failure, what differs)."""
    lab.leave_layout()
    found = {}
    for case in arguments["cases"]:
        with lab.layout(resume.recipe_of(case)), resume.engine(case):
            for name in case["formats"]:
                key = f"{case['name']} {name}"
                found[key] = list(resumed(case, "off", "on", name, Path(arguments["folder"]) / key))
    return found


def inner_of(room: lab.Lab, router: Any) -> tuple[Any, Any, Any]:
    """(distributed optimizer, the slice of the router's weight that it holds, FusedAdam); Nones where it has none."""
    return next(
        (
            (one, held, one.optimizer)
            for one in checkpoint.optimizers(room)
            for parameter, held in checkpoint._main_copies(one)
            if parameter is router.weight
        ),
        (None, None, None),
    )


def main_copies(room: lab.Lab) -> dict[str, torch.Tensor]:
    """The main copy, in fp32, of every router weight that this rank's optimizer holds a slice of."""
    found = {}
    for name, router in room.routers():
        _, held, inner = inner_of(room, router)
        if held is None:
            continue
        if held.dtype == torch.float32:
            found[name] = held.detach().clone()
            continue
        main = inner.get_unscaled_state(held, "master_param")
        # Of a main copy with remainders the weight has the upper half; how they join is FusedAdam's arithmetic.
        found[name] = joined(held.detach(), main) if main.dtype == torch.int16 else main.clone()
    return found


def joined(weight: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """weight.view(uint16) << 16 | rest, after the weight was rounded up where the rest is negative; in NumPy."""
    upper = weight.view(torch.int16).numpy().astype(np.int64) - (rest.numpy() < 0)
    bits = ((upper << 16) | (rest.numpy().astype(np.int64) & 0xFFFF)) & 0xFFFFFFFF
    return torch.from_numpy(bits.astype(np.uint32).view(np.float32))


def resumed(this: dict[str, Any], before: str, after: str, name: str, folder: Path) -> tuple[str, list[str]]:
    """Save with the plugin `before`, load `after`: (what was raised, what differs now or three steps later).

    Across on and off, main copies of router weights are compared, and all moments.
    """
    recipe = resume.recipe_of(this)
    resume.turn(before)
    room = resume.build(recipe)
    resume.train(room, 0)
    failure = resume.attempt(lambda: checkpoint.save(room, folder, name))
    resume.turn(after)
    other = resume.build(recipe)
    failure = failure or resume.attempt(lambda: checkpoint.load(other, folder, name))
    if failure:
        return failure, []
    if before != after:
        expected, found = main_copies(room), main_copies(other)
        wrong = [weight for weight in expected if not torch.equal(expected[weight].view(-1), found[weight].view(-1))]
        saved, loaded = checkpoint.snapshot(room), checkpoint.snapshot(other)
        return "", wrong + [key for key in checkpoint.differences(saved, loaded) if "exp_avg" in key]
    different = checkpoint.differences(checkpoint.snapshot(room), checkpoint.snapshot(other))
    losses = resume.train(room, resume.STEPS) != resume.train(other, resume.STEPS)
    later = checkpoint.differences(checkpoint.snapshot(room), checkpoint.snapshot(other))
    return "", [*different, *later, *(["losses"] if losses else [])]
