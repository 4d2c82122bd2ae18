"""The distributed optimizer with fp32 parameters beside bf16 ones in one group.

An fp32 router makes such groups, and upstream is wrong about them in two places (NVIDIA/Megatron-LM #2777): it numbers
a group's parameters in gradient-buffer order and then installs them as fp32 ones first, bf16 ones after, so every
lookup while saving or loading finds a neighbour's Adam state; and its fp32 shards are views of a leaf that requires
gradients, which half of its loaders write to outside no_grad. Groups of one dtype are left as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Final

from megatron_fp32_router.casts.router import is_protected
from megatron_fp32_router.errors import CheckpointRefusedError
from megatron_fp32_router.patching.registry import mismatch, registry, replaces
from megatron_fp32_router.settings import PREFIX

#: The id of the record under which status() says whether upstream repaired this itself.
REPAIR: Final = "optimizer-mixed-groups"

#: Where `_build_model_and_main_param_groups` returns them.
_SHARD_FP32_GROUPS: Final = 3


def _mixed_groups(optimizer: Any) -> Iterator[tuple[int, list[Any], list[Any]]]:
    """(index, fp32 parameters, bf16 parameters) of every group that has both."""
    groups = zip(optimizer.model_fp32_groups, optimizer.model_float16_groups, strict=True)
    for index, (fp32, float16) in enumerate(groups):
        if fp32 and float16:
            yield index, fp32, float16


def _true_numbering(optimizer: Any) -> dict[Any, tuple[int, int]]:
    """parameter -> (group, place in it) as the mixed groups are installed: fp32 ones first."""
    return {
        parameter: (index, place)
        for index, fp32, float16 in _mixed_groups(optimizer)
        for place, parameter in enumerate([*fp32, *float16])
    }


def _numbering_is_stale(optimizer: Any) -> bool:
    found = optimizer.model_param_group_index_map
    return any(found[parameter] != place for parameter, place in _true_numbering(optimizer).items())


def _detach(shards: list[Any], installed: list[Any]) -> bool:
    """Replace the fp32 `shards` of a group, here and among its `installed` parameters; whether one had to be.

    A detached shard shares the parameter's memory as the view did, so the inner optimizer's step still lands in the
    model. What Megatron noted on the shard (its tensor-parallel attributes) goes along.
    """
    changed = False
    for place, shard in enumerate(shards):
        if not shard.is_leaf:
            detached = shard.detach()
            vars(detached).update(vars(shard))
            shards[place] = installed[place] = detached
            changed = True
    return changed


def repair_mixed_groups(original: Callable[..., None]) -> Callable[..., None]:
    """DistributedOptimizer.__init__: fp32 shards that can be loaded into, and a numbering that follows the groups.

    The shards are replaced before the inner optimizer is told of them; CPU offload takes leaves only.
    """

    @replaces(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        build = self._build_model_and_main_param_groups
        undetached = False

        def detaching(gbuf_ranges: Any, param_map: Any, opt_group_ranges: Any, config: Any, *rest: Any) -> Any:
            nonlocal undetached
            groups = build(gbuf_ranges, param_map, opt_group_ranges, config, *rest)
            for shards, group in zip(groups[_SHARD_FP32_GROUPS], opt_group_ranges, strict=True):
                # fp32 training is not ours. A group of its own (another learning rate) may hold the router only.
                if config.bf16 or config.fp16:
                    undetached |= _detach(shards, group["orig_group"]["params"])
            return groups

        # The call is `self._build…(…)`: shadowed for this one construction, the class stays as it is.
        self._build_model_and_main_param_groups = detaching
        try:
            original(self, *args, **kwargs)
        finally:
            del self._build_model_and_main_param_groups
        # A rank whose parameters are all frozen, and Megatron-FSDP, have no groups at all.
        numbering = _true_numbering(self) if hasattr(self, "model_param_group_index_map") else {}
        if not numbering:
            return
        if undetached or _numbering_is_stale(self):
            self.model_param_group_index_map.update(numbering)
        else:
            registry.needless[REPAIR] = "this Megatron treats groups of fp32 and bf16 parameters rightly (#5835)"

    return __init__


def refuse_stale_numbering(original: Callable[..., Any]) -> Callable[..., Any]:
    """DistributedOptimizer's save and load entry points: an error before anything is written or overwritten.

    The repair leaves nothing to refuse; an optimizer that was built before the plugin was turned on lacks it.
    """

    @replaces(original)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(map(is_protected, getattr(self, "model_param_group_index_map", ()))) and _numbering_is_stale(self):
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
    """Whether the model has fp32 router parameters in training, be it in another optimizer of the chain."""
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
    # The repair counts the padding that was stripped; under another name for it, a save that works is refused.
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
