"""Patches that only the monitor needs."""

from __future__ import annotations

from functools import partial
from typing import Final

from megatron_fp32_router.patching.record import FINALIZE, OPTIMIZER, UPSTREAM, Function, Patch


def look_at_steps(original: Function) -> Function:
    from megatron_fp32_router.monitor import watch

    return watch.look_at_steps(original)


def remember_optimizer(original: Function) -> Function:
    from megatron_fp32_router.monitor import contract

    return contract.remember_optimizer(original)


_look: Final = partial(Patch, goes_with="router-casts", area="monitor", whole=False, monitor=True)

PATCHES: Final = (
    _look(
        id="monitor-step",
        module=FINALIZE,
        path="_allreduce_conditional_embedding_grads",
        factory=look_at_steps,
        why="the monitor would not know when a step's gradients are there",
        issue=f"{UPSTREAM}/issues/2398",
        remove_when="the monitor goes; the target is only a place that every finalize_model_grads passes once",
        parameters=("model", "config"),
    ),
    _look(
        id="monitor-optimizer",
        module=OPTIMIZER,
        path="MegatronOptimizer.__init__",
        factory=remember_optimizer,
        why="the monitor could not say what dtype main copies and moments have",
        issue=f"{UPSTREAM}/issues/2777",
        remove_when="the monitor goes",
        parameters=("self", "optimizer", "config"),
    ),
)
