"""Emerging optimizers: which of them nobody has run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from megatron_fp32_router.patching.record import OPTIMIZER, UPSTREAM, Patch, deferred

if TYPE_CHECKING:
    from megatron_fp32_router.optimizers.emerging import refusal
else:
    refusal = deferred(__package__, "refusal")

PATCHES: Final = (
    Patch(
        id="refuse-optimizers",
        module=OPTIMIZER,
        path="MixedPrecisionOptimizer.__init__",
        factory=refusal.look_at_configuration,
        why="nobody has run this emerging optimizer with fp32 router parameters",
        issue=f"{UPSTREAM}/issues/5470",
        remove_when="every emerging optimizer has been tested",
        goes_with="router-casts",
        area="optimizer",
        whole=False,
        parameters=("self", "optimizer", "config"),
    ),
)
