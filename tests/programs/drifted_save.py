"""What the two ranks of tests/test_areas.py run: they train, and save in a format whose function has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import megatron_fp32_router as plugin
from megatron_fp32_router import lab
from megatron_fp32_router.lab import checkpoint


def train_and_save(recipe: Any, arguments: dict[str, Any]) -> list[str]:
    """What stopped the save: the error's class and text, or nothing."""
    room = lab.build(recipe)
    for _ in range(2):
        room.step(lab.text_batches(recipe, seed=1))
    try:
        checkpoint.save(room, Path(arguments["folder"]), "fully_reshardable")
    except plugin.Fp32RouterError as error:
        return [type(error).__name__, str(error)]
    return []
