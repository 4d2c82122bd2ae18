"""Checkpoints of the precision-aware optimizer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from megatron_fp32_router.patching.record import DISTRIBUTED_OPTIMIZER, UPSTREAM, Patch, deferred

if TYPE_CHECKING:
    from megatron_fp32_router.optimizers.precision_aware import repair
else:
    repair = deferred(__package__, "repair")

_patch: Final = partial(Patch, module=DISTRIBUTED_OPTIMIZER, goes_with="router-casts", area="distributed")

_formats: Final = partial(
    _patch,
    factory=repair.warn_before_a_save_in_vain,
    why="Megatron saves a precision-aware optimizer in formats that it cannot load, without a warning",
    issue="not reported upstream",
    remove_when="every format that can be saved can be loaded",
    whole=False,
    essential=False,
)

PATCHES: Final = (
    _patch(
        id="precision-aware-save",
        path="DistributedOptimizer._get_main_param_and_optimizer_states",
        factory=repair.save_the_parameter,
        why="with the precision-aware optimizer, checkpoints hold the router weight of the first step as its main copy",
        issue=f"{UPSTREAM}/issues/7338",
        remove_when="an fp32 parameter is its own main copy there too",
        parameters=("model_param",),
    ),
    _patch(
        id="precision-aware-load",
        path="DistributedOptimizer._set_main_param_and_optimizer_states",
        factory=repair.load_the_parameter,
        why="with the precision-aware optimizer, a loaded main copy never reaches an fp32 router weight",
        issue=f"{UPSTREAM}/issues/7338",
        remove_when="an fp32 parameter is its own main copy there too",
        parameters=("model_param", "tensors"),
    ),
    _formats(id="precision-aware-formats", path="DistributedOptimizer.sharded_state_dict"),
    _formats(id="precision-aware-formats-legacy", path="DistributedOptimizer.save_parameter_state"),
)
