"""Communication of fp32 router parameters in model chunks without buckets.

All chunks of a virtual pipeline but the first have one group of buckets for everything, whose collectives torch
coalesces. Coalescing wants tensors of one dtype: an all-reduce of fp32 and bf16 gradients raises, and gloo's all-gather
of fp32 and bf16 parameters returns garbage without a word. A group for each dtype costs one more collective a chunk, as
the first chunk has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_fp32_router.registry import replaces


def one_dtype_per_group(original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """partition_buckets, as DistributedDataParallel calls it: a group for each parameter dtype where one was forced.

    Quantized parameters are left to Megatron, which groups them on purpose.
    """

    @replaces(original)
    def partition_buckets(
        buffers: list[Any], force_single_bucket_group: bool = False, *args: Any, **kwargs: Any
    ) -> list[Any]:
        dtypes = list(dict.fromkeys(buffer.param_dtype for buffer in buffers))
        if not force_single_bucket_group or len(dtypes) < 2 or torch.uint8 in dtypes:
            return original(buffers, force_single_bucket_group, *args, **kwargs)
        return [
            group
            for dtype in dtypes
            for group in original([b for b in buffers if b.param_dtype == dtype], True, *args, **kwargs)
        ]

    return partition_buckets
