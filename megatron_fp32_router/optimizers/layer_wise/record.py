"""The layer-wise distributed optimizer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from megatron_fp32_router.patching.record import OPTIMIZERS, UPSTREAM, Patch, deferred

if TYPE_CHECKING:
    from megatron_fp32_router.optimizers.layer_wise import repair
else:
    repair = deferred(__package__, "repair")

_CLASS: Final = "LayerWiseDistributedOptimizer"

_patch: Final = partial(
    Patch,
    module=f"{OPTIMIZERS}.layer_wise_optimizer",
    issue=f"{UPSTREAM}/issues/5470",
    goes_with="router-casts",
    since="0.16",
    area="layer_wise",
)

_load: Final = partial(
    _patch,
    factory=repair.spread_loaded_weights,
    why="after a resume from a run without the plugin, ranks go on with different router weights",
    remove_when="loading gathers fp32 parameters",
    whole=False,
)

PATCHES: Final = (
    _patch(
        id="layer-wise-gather",
        path=f"{_CLASS}.allgather_params",
        factory=repair.gather_by_dtype,
        why="the layer-wise optimizer gathers fp32 router parameters as if they were bf16",
        remove_when="parameters are gathered by dtype",
    ),
    _load(id="layer-wise-load", path=f"{_CLASS}.load_state_dict"),
    _load(
        id="layer-wise-load-file",
        path=f"{_CLASS}.load_state_dict_from_file",
        absent_where=(f"{_CLASS}.load_state_dict uses state_dict",),
    ),
)
