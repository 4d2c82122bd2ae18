"""Gradient buckets of a virtual pipeline, cut by dtype."""

from __future__ import annotations

from typing import Final

from megatron_fp32_router.patching.record import DDP, Function, Patch


def fp32_in_groups_of_their_own(original: Function) -> Function:
    from megatron_fp32_router.optimizers.buckets import repair

    return repair.fp32_in_groups_of_their_own(original)


PATCHES: Final = (
    Patch(
        id="bucket-groups",
        module=DDP,
        path="partition_buckets",
        factory=fp32_in_groups_of_their_own,
        why="in a virtual pipeline, fp32 and bf16 tensors share one coalesced collective: an error, or garbage weights",
        issue="not reported upstream",
        remove_when="groups of buckets are cut by dtype",
        goes_with="router-casts",
        area="data_parallel",
        parameters=("buffers", "force_single_bucket_group"),
    ),
)
