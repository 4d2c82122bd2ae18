"""Gradient buckets of a virtual pipeline, cut by dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from megatron_fp32_router.patching.record import DDP, Patch, deferred

if TYPE_CHECKING:
    from megatron_fp32_router.optimizers.buckets import repair
else:
    repair = deferred(__package__, "repair")

PATCHES: Final = (
    Patch(
        id="bucket-groups",
        module=DDP,
        path="partition_buckets",
        factory=repair.fp32_in_groups_of_their_own,
        why="in a virtual pipeline, fp32 and bf16 tensors share one coalesced collective: an error, or garbage weights",
        issue="not reported upstream",
        remove_when="groups of buckets are cut by dtype",
        goes_with="router-casts",
        area="data_parallel",
        parameters=("buffers", "force_single_bucket_group"),
    ),
)
