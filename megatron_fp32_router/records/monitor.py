"""Patches that only the monitor needs."""

from __future__ import annotations

from typing import Final

from megatron_fp32_router.records.patch import UPSTREAM, Patch

_FINALIZE: Final = "megatron.core.distributed.finalize_model_grads"
_OPTIMIZER: Final = "megatron.core.optimizer.optimizer"

MONITOR: Final = (
    Patch(
        id="monitor-step",
        module=_FINALIZE,
        path="_allreduce_conditional_embedding_grads",
        factory="monitor.watch:look_at_steps",
        why="the monitor would not know when a step's gradients are there",
        issue=f"{UPSTREAM}/issues/2398",
        remove_when="the monitor goes; the target is only a place that every finalize_model_grads passes once",
        area="monitor",
        whole=False,
        parameters=("model", "config"),
        monitor=True,
    ),
    Patch(
        id="monitor-optimizer",
        module=_OPTIMIZER,
        path="MegatronOptimizer.__init__",
        factory="monitor.contract:remember_optimizer",
        why="the monitor could not say what dtype main copies and moments have",
        issue=f"{UPSTREAM}/issues/2777",
        remove_when="the monitor goes",
        area="monitor",
        whole=False,
        parameters=("self", "optimizer", "config"),
        monitor=True,
    ),
)
