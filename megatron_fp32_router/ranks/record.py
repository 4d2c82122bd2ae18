"""Patches at which ranks compare what they run, before any collective that a difference could hang."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from megatron_fp32_router.patching.record import DDP, OPTIMIZER, UPSTREAM, Patch, deferred

if TYPE_CHECKING:
    from megatron_fp32_router.ranks import places
else:
    places = deferred(__package__, "places")

_compare: Final = partial(
    Patch,
    issue=f"{UPSTREAM}/issues/1482",
    remove_when="router-casts goes",
    goes_with="router-casts",
    whole=False,
)

PATCHES: Final = (
    _compare(
        id="ranks-speak",
        module=DDP,
        path="DistributedDataParallel.__init__",
        factory=places.publish_when_wrapping,
        why="nobody would notice a rank without the plugin",
        parameters=("config", "ddp_config", "module"),
    ),
    _compare(
        id="ranks-agree-before-broadcast",
        module=DDP,
        path="DistributedDataParallel.broadcast_params",
        factory=places.agree_first,
        why="parameters of different dtypes would be broadcast into each other where a rank lacks the plugin",
    ),
    _compare(
        id="ranks-agree",
        module=OPTIMIZER,
        path="MegatronOptimizer.__init__",
        factory=places.agree_first,
        why="the first step would hang or mix up gradients where a rank lacks the plugin",
        parameters=("optimizer", "config"),
    ),
)
