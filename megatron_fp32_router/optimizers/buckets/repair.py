"""Communication of fp32 router parameters in groups of buckets that Megatron forms across dtypes.

All chunks of a virtual pipeline but the first have one group of buckets for everything, and quantized parameters share
one with the unquantized. torch coalesces the collectives of a group, and needs one dtype for that: an all-reduce of
fp32 and bf16 gradients raises, and an all-gather of fp32 and bf16 parameters returns garbage (gloo). So fp32
parameters get a group of their own. That costs one more collective for each chunk, as in the first chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_fp32_router.patching.registry import replaces


def fp32_in_groups_of_their_own(original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """partition_buckets, as DistributedDataParallel calls it: what Megatron groups, without fp32 parameters in it."""

    @replaces(original)
    def partition_buckets(
        buffers: list[Any], force_single_bucket_group: bool = False, *args: Any, **kwargs: Any
    ) -> list[Any]:
        fp32 = [buffer for buffer in buffers if buffer.param_dtype == torch.float32]
        others = [buffer for buffer in buffers if buffer.param_dtype != torch.float32]
        mixes = force_single_bucket_group or any(buffer.param_dtype == torch.uint8 for buffer in others)
        if not (fp32 and others and mixes):
            return original(buffers, force_single_bucket_group, *args, **kwargs)
        return [
            *original(others, force_single_bucket_group, *args, **kwargs),
            *original(fp32, force_single_bucket_group, *args, **kwargs),
        ]

    return partition_buckets
