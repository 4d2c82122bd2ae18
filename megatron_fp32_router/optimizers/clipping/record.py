"""Norms and clipping over gradients of several dtypes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from megatron_fp32_router.patching.record import OPTIMIZERS, UPSTREAM, Patch, deferred

if TYPE_CHECKING:
    from megatron_fp32_router.optimizers.clipping import repair
else:
    repair = deferred(__package__, "repair")

PATCHES: Final = (
    Patch(
        id="clip-by-dtype",
        module=f"{OPTIMIZERS}.clip_grads",
        path="multi_tensor_applier",
        factory=repair.one_call_a_dtype,
        why="over gradients in two dtypes the norm is wrong, and clipping overwrites some with garbage",
        issue=f"{UPSTREAM}/issues/7338",
        remove_when="norms and clipping take gradients of several dtypes",
        goes_with="router-casts",
        area="optimizer",
        parameters=("op", "noop_flag_buffer", "tensor_lists"),
    ),
)
