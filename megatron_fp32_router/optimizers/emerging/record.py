"""Emerging optimizers: which of them nobody has run."""

from __future__ import annotations

from typing import Final

from megatron_fp32_router.patching.record import OPTIMIZER, UPSTREAM, Function, Patch


def look_at_configuration(original: Function) -> Function:
    from megatron_fp32_router.optimizers.emerging import refusal

    return refusal.look_at_configuration(original)


PATCHES: Final = (
    Patch(
        id="refuse-optimizers",
        module=OPTIMIZER,
        path="MixedPrecisionOptimizer.__init__",
        factory=look_at_configuration,
        why="nobody has run this emerging optimizer with fp32 router parameters",
        issue=f"{UPSTREAM}/issues/5470",
        remove_when="every emerging optimizer has been tested",
        goes_with="router-casts",
        area="optimizer",
        whole=False,
        parameters=("self", "optimizer", "config"),
    ),
)
