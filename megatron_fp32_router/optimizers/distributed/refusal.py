"""Checkpoints of the distributed optimizer that would be wrong: refused before anything is written or overwritten."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from megatron_fp32_router.casts.router import is_protected
from megatron_fp32_router.errors import CheckpointRefusedError
from megatron_fp32_router.optimizers.distributed.repair import numbering_is_stale
from megatron_fp32_router.patching.registry import mismatch, replaces
from megatron_fp32_router.settings import PREFIX


def refuse_stale_numbering(original: Callable[..., Any]) -> Callable[..., Any]:
    """DistributedOptimizer's save and load entry points: an error before anything is written or overwritten.

    An optimizer that was built before the plugin was turned on has not been repaired. Any other has nothing to refuse.
    """

    @replaces(original)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(map(is_protected, getattr(self, "model_param_group_index_map", ()))) and numbering_is_stale(self):
            mismatch(
                CheckpointRefusedError,
                "this distributed optimizer was built before megatron-fp32-router was turned on, or somebody replaced "
                "its constructor: fp32 router parameters lie beside bf16 ones, and its numbering mixes up which state "
                "belongs to which parameter (NVIDIA/Megatron-LM #2777). Nothing has been saved or loaded. Turn the "
                f"plugin on before the optimizer is built, or train with {PREFIX}_PROTECT=buffers, or save without "
                "optimizer state (--no-save-optim, --no-load-optim).",
            )
        return original(self, *args, **kwargs)

    return guarded


def _trains_routers(optimizer: Any) -> bool:
    """Whether the model trains fp32 router parameters, in this optimizer or in another one of the chain."""
    parameters = (parameter for chunk in optimizer.model_chunks for parameter in chunk.parameters())
    return any(is_protected(parameter) and parameter.requires_grad for parameter in parameters)


def _padded_inside(buffer: Any) -> bool:
    """Whether a bucket of this gradient buffer ends in padding and another one follows."""
    return any(bucket.grad_data.numel() != bucket.numel_unpadded for bucket in buffer.buckets[:-1])


def refuse_misplaced_state(original: Callable[..., Any]) -> Callable[..., Any]:
    """DistributedOptimizer.sharded_param_state_fully_reshardable: no save that upstream fills from the wrong places.

    0.15 to 0.19 strip the padding between buckets and then look parameters up where they lay with it: what is saved
    for everything behind a padded bucket belongs to others, or is zero (#5077). It has nothing to do with routers, but
    this is the format that the plugin tells people to save in.

    Raises:
        CheckpointRefusedError: there is such a bucket. Loading a good checkpoint is not affected.
    """
    # The repair in #5077 counts the padding that was stripped. If it is renamed, a save that works is refused.
    code = getattr(inspect.unwrap(original), "__code__", None)
    repaired = "cumulative_padding_stripped" in getattr(code, "co_varnames", ())

    @replaces(original)
    def sharded_param_state_fully_reshardable(
        self: Any, model_sharded_state_dict: Any, is_loading: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        concerns_us = not is_loading and not repaired and _trains_routers(self)
        if concerns_us and any(_padded_inside(buffer) for buffer in self.buffers):
            mismatch(
                CheckpointRefusedError,
                "this Megatron saves wrong optimizer state in the format fully_reshardable when a gradient buffer has "
                "several buckets that end in padding (NVIDIA/Megatron-LM #5077), as here. Nothing has been saved. "
                "Train without --ddp-pad-buckets-for-high-nccl-busbw, or with --ddp-bucket-size so large that there is "
                "one bucket, or save without --dist-ckpt-optim-fully-reshardable (state by gradient buffer, which the "
                "plugin reads whether it was saved with it or without).",
            )
        return original(self, model_sharded_state_dict, is_loading, *args, **kwargs)

    return sharded_param_state_fully_reshardable
