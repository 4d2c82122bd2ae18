"""Refit: weights handed from a training to the model that generates."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from megatron_fp32_router.patching.record import UPSTREAM, Patch, deferred

if TYPE_CHECKING:
    from megatron_fp32_router.optimizers.refit import repair
else:
    repair = deferred(__package__, "repair")

_RESHARDING: Final = "megatron.core.resharding"

_patch: Final = partial(
    Patch,
    why="refit would copy an fp32 router weight's bytes into a bf16 one",
    issue=f"{UPSTREAM}/pull/4580",
    remove_when="refit converts dtypes of parameters",
    goes_with="router-casts",
    since="0.16",
    area="refit",
)

#: Called by the name that Megatron's own refit imported, or by the package's.
_convert: Final = partial(
    _patch,
    path="execute_reshard_plan",
    factory=repair.convert,
    parameters=("plan", "src_module", "dst_module", "service"),
    # What is sent is looked up by name among the source model's parameters and buffers. No more of refit: its other
    # functions change often, and what they might change here shows (an operation whose name is not read, an
    # attribute that is missing).
    relies_on=(f"{_RESHARDING}.utils:named_refit_tensors named_persistent_buffers get_refit_tensor_dict",),
)

PATCHES: Final = (
    _patch(
        id="refit-senders",
        module=f"{_RESHARDING}.planner",
        path="extract_param_metadata",
        factory=repair.say_who_converts,
        parameters=("param", "param_name"),
    ),
    _patch(
        id="refit-dtypes",
        module=f"{_RESHARDING}.planner",
        path="select_src_metadata_balanced",
        factory=repair.name_dtypes,
        parameters=("src_meta_list", "dst_metadata", "dst_rank"),
        needs=("refit-senders",),
    ),
    _convert(id="refit-convert", module=f"{_RESHARDING}.refit"),
    _convert(id="refit-convert-in-package", module=_RESHARDING),
)
