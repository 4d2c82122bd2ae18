"""Checkpoints of Float16OptimizerWithFloat16Params."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from megatron_fp32_router.patching.record import OPTIMIZER, UPSTREAM, Patch, deferred

if TYPE_CHECKING:
    from megatron_fp32_router.optimizers.float16 import repair
else:
    repair = deferred(__package__, "repair")

_patch: Final = partial(
    Patch,
    module=OPTIMIZER,
    why="with fp32 router parameters, main copies are saved and loaded as another parameter's, or not at all",
    issue=f"{UPSTREAM}/pull/5929",
    remove_when="fp32 parameters have an fp32_param in checkpoints too, to turn the plugin on and off",
    goes_with="router-casts",
    area="optimizer",
)

PATCHES: Final = (
    _patch(
        id="float16-state",
        path="Float16OptimizerWithFloat16Params.state_dict",
        factory=repair.state_with_every_main_copy,
    ),
    _patch(
        id="float16-sharded-state",
        path="Float16OptimizerWithFloat16Params.sharded_state_dict",
        factory=repair.sharded_state_with_every_main_copy,
        parameters=("model_sharded_state_dict", "is_loading"),
    ),
    _patch(
        id="float16-load",
        path="Float16OptimizerWithFloat16Params.load_state_dict",
        factory=repair.load_every_main_copy,
        parameters=("state_dict",),
    ),
)
