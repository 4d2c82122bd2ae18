"""Patches at which ranks compare what they run, before any collective that a difference could hang."""

from __future__ import annotations

from typing import Final

from megatron_fp32_router.records.patch import UPSTREAM, Patch

_OPTIMIZER: Final = "megatron.core.optimizer.optimizer"
_DDP: Final = "megatron.core.distributed.distributed_data_parallel"

RANKS: Final = (
    Patch(
        id="ranks-speak",
        module=_DDP,
        path="DistributedDataParallel.__init__",
        factory="protect.agreement:publish_when_wrapping",
        why="a rank without the plugin would be noticed by nobody",
        issue=f"{UPSTREAM}/issues/1482",
        remove_when="router-casts goes",
        whole=False,
        parameters=("self", "config", "ddp_config", "module"),
    ),
    Patch(
        id="ranks-agree-before-broadcast",
        module=_DDP,
        path="DistributedDataParallel.broadcast_params",
        factory="protect.agreement:agree_first",
        why="parameters of different dtypes would be broadcast into each other where a rank lacks the plugin",
        issue=f"{UPSTREAM}/issues/1482",
        remove_when="router-casts goes",
        whole=False,
        parameters=("self",),
    ),
    Patch(
        id="ranks-agree",
        module=_OPTIMIZER,
        path="MegatronOptimizer.__init__",
        factory="protect.agreement:agree_first",
        why="the first step would hang or mix up gradients where a rank lacks the plugin",
        issue=f"{UPSTREAM}/issues/1482",
        remove_when="router-casts goes",
        whole=False,
        parameters=("self", "optimizer", "config"),
    ),
)
