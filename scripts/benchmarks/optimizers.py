"""A training step with the optimizers of large recipes, with the plugin on against off."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.pairs import Report, compare
from benchmarks.training import SIZES, pair_of_steps

#: name -> fields of lab.Recipe. Dtypes are torch's names: nothing here imports it before scripts/bench has prepared it.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "precision-aware, bf16 gradients and moments": {
        "optimizer": "distributed",
        "optimizer_extra": {
            "use_precision_aware_optimizer": True,
            "main_grads_dtype": "bfloat16",
            "exp_avg_dtype": "bfloat16",
            "exp_avg_sq_dtype": "bfloat16",
        },
        "ddp_extra": {"grad_reduce_in_fp32": False},
    },
    "Muon": {"optimizer_extra": {"optimizer": "muon", "weight_decay": 0.1}},
}


def measure(pairs: int, transformer_engine: Path, report: Report) -> list[dict[str, Any]]:
    """Time a step of the medium model with each of them.

    Args:
        pairs: how many pairs count.
        transformer_engine: the folder that holds its Python.
        report: gets told how far it is.
    """
    import torch

    from megatron_fp32_router import lab
    from megatron_fp32_router.lab import transformer_engine as engine

    rows = []
    for name, fields in OPTIMIZERS.items():
        settings = {
            key: getattr(torch, value) if key.endswith("_dtype") else value
            for key, value in fields["optimizer_extra"].items()
        }
        recipe = lab.Recipe(**{**SIZES["medium"], **fields, "optimizer_extra": settings})
        aware = "use_precision_aware_optimizer" in settings
        with lab.parallel(recipe), engine.in_use(transformer_engine) if aware else nullcontext():
            off, on = pair_of_steps(recipe, lambda text, name=name: report(f"{name}: {text}"), 2 * (pairs + 2))
            rows.append({"optimizer": name, "size": "medium", **compare(off, on, pairs)})
    return rows


def make_importable(folders: list[Path]) -> None:
    """Put emerging-optimizers and what it imports on the path. Call it before Megatron is imported."""
    sys.path[:0] = map(str, folders)
