"""Patches that only the monitor needs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from megatron_fp32_router.patching.record import FINALIZE, OPTIMIZER, UPSTREAM, Patch, deferred

if TYPE_CHECKING:
    from megatron_fp32_router.monitor import precision, watch
else:
    watch, precision = deferred(__package__, "watch"), deferred(__package__, "precision")

_look: Final = partial(Patch, goes_with="router-casts", area="monitor", whole=False, monitor=True)

PATCHES: Final = (
    _look(
        id="monitor-step",
        module=FINALIZE,
        path="_allreduce_conditional_embedding_grads",
        factory=watch.look_at_steps,
        why="the monitor would not know when a step's gradients are there",
        issue=f"{UPSTREAM}/issues/2398",
        remove_when="the monitor goes; the target is only a place that every finalize_model_grads passes once",
        parameters=("model", "config"),
    ),
    _look(
        id="monitor-optimizer",
        module=OPTIMIZER,
        path="MegatronOptimizer.__init__",
        factory=precision.remember_optimizer,
        why="the monitor could not say what dtype main copies and moments have",
        issue=f"{UPSTREAM}/issues/2777",
        remove_when="the monitor goes",
        parameters=("optimizer", "config"),
    ),
)
