"""The laboratory: a real, unmodified Megatron, tiny, trained on a CPU (gloo) or on a GPU when there is one.

Names are imported on first use, so that importing this package does not import torch. Only the command line, the
probe, scripts and tests import it: it makes torch pretend that a CPU is a CUDA device, which must never happen in a
user's training.

    from megatron_fp32_router import lab

    lab.prepare("path/to/a/tree/holding/megatron")   # before Megatron is imported
    recipe = lab.Recipe(layers=2, experts=8, bias_start=0.75)
    with lab.parallel(recipe):
        room = lab.build(recipe)
        batches = lab.text_batches(recipe, seed=1)
        losses = [room.step(batches) for _ in range(20)]

Several ranks are processes; each calls `function(recipe, arguments)` inside `lab.parallel(recipe)`:

    results = lab.run_ranks("module:function", recipe, {"steps": 5}, megatron=tree, plugin=True)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_fp32_router.lab.compat import megatron_version
    from megatron_fp32_router.lab.groups import layout, leave_layout, parallel, prepare, seed
    from megatron_fp32_router.lab.launch import RankFailedError, RanksTimedOutError, run_ranks
    from megatron_fp32_router.lab.model import make_config, make_router
    from megatron_fp32_router.lab.recipe import LabError, Recipe
    from megatron_fp32_router.lab.text import text_batches
    from megatron_fp32_router.lab.train import Lab, Routing, build, build_model, wrap

_NAMES = {
    "compat": ("megatron_version",),
    "groups": ("layout", "leave_layout", "parallel", "prepare", "seed"),
    "launch": ("RankFailedError", "RanksTimedOutError", "run_ranks"),
    "model": ("make_config", "make_router"),
    "recipe": ("LabError", "Recipe"),
    "text": ("text_batches",),
    "train": ("Lab", "Routing", "build", "build_model", "wrap"),
}

__all__ = [
    "Lab",
    "LabError",
    "RankFailedError",
    "RanksTimedOutError",
    "Recipe",
    "Routing",
    "build",
    "build_model",
    "layout",
    "leave_layout",
    "make_config",
    "make_router",
    "megatron_version",
    "parallel",
    "prepare",
    "run_ranks",
    "seed",
    "text_batches",
    "wrap",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its file, on first use."""
    home = next((home for home, names in _NAMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
