"""Patches that look at the router tensors of a model that has just been wrapped."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from megatron_fp32_router.patching.record import MODULE, UPSTREAM, Patch, deferred

if TYPE_CHECKING:
    from megatron_fp32_router.wrapping import survey
else:
    survey = deferred(__package__, "survey")

_check: Final = partial(
    Patch,
    path="Float16Module.__init__",
    factory=survey.look_after_wrapping,
    issue=f"{UPSTREAM}/issues/1482",
    goes_with="router-casts",
)

PATCHES: Final = (
    _check(
        id="wrap-check",
        module=MODULE,
        why="nobody would see whether the routers really stayed fp32",
        remove_when="router-casts goes",
        parameters=("config", "module"),
        # The wrapped model is `self.module` when the constructor has ended.
        relies_on=(f"{MODULE}:Float16Module MegatronModule.__init__",),
    ),
    _check(
        id="legacy-wrap-check",
        module="megatron.legacy.model.module",
        why="0.11's own training wraps with this class; nobody would see whether the routers stayed fp32",
        remove_when="0.11 is no longer supported",
        absent_where=("no Float16Module",),  # its file stays to 0.17, the class does not
        whole=False,
        parameters=("module",),
    ),
)
