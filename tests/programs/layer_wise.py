"""What the two ranks of tests/megatron/test_layer_wise.py run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from programs import resume

from megatron_fp32_router.lab import checkpoint
from megatron_fp32_router.lab.layer_wise import build, parameters


def train(recipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """For each mode: parameters after three steps, and which fp32 parameters this rank updated; then resumes."""
    found: dict[str, Any] = {}
    for mode in arguments["modes"]:
        room = build(recipe, mode)
        resume.train(room, 0)
        mains = [one for group in checkpoint.optimizers(room)[0].optimizer.param_groups for one in group["params"]]
        mine = [name for name, parameter in room.chunks[0].named_parameters() if any(parameter is one for one in mains)]
        found[mode] = {"parameters": parameters(room), "mine": mine}
    for name in arguments["resumes"]:
        before, mode, kind = name.split()
        resume.turn(before)
        room = build(recipe, mode)
        resume.train(room, 0)
        parameters(room)
        checkpoint.save(room, Path(arguments["folder"]) / name, kind)
        saved = checkpoint.snapshot(room)
        resume.turn("on")
        other = build(recipe, mode)
        checkpoint.load(other, Path(arguments["folder"]) / name, kind)
        found[name] = {"saved": saved, "loaded": checkpoint.snapshot(other)}
    return found
