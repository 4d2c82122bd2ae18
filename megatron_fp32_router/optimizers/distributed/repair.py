"""The distributed optimizer with fp32 parameters beside bf16 ones in one group.

An fp32 router makes such groups, and upstream is wrong about them in two places (NVIDIA/Megatron-LM #2777): it numbers
a group's parameters in gradient-buffer order and then installs them as fp32 ones first, bf16 ones after, so every
lookup while saving or loading finds a neighbour's Adam state; and its fp32 shards are views of a leaf that requires
gradients, which half of its loaders write to outside no_grad. Groups of one dtype are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from megatron_fp32_router.patching.registry import registry, replaces

#: The id of the record under which status() says whether upstream repaired this itself.
REPAIR: Final = "optimizer-mixed-groups"

#: Where `_build_model_and_main_param_groups` returns them.
_SHARD_FP32_GROUPS: Final = 3


def _true_numbering(optimizer: Any) -> dict[Any, tuple[int, int]]:
    """parameter -> (group, place in it), of groups with both dtypes, in which Megatron installs fp32 ones first."""
    groups = zip(optimizer.model_fp32_groups, optimizer.model_float16_groups, strict=True)
    return {
        parameter: (index, place)
        for index, (fp32, float16) in enumerate(groups)
        if fp32 and float16
        for place, parameter in enumerate([*fp32, *float16])
    }


def numbering_is_stale(optimizer: Any) -> bool:
    """Whether its index map does not follow its groups."""
    found = optimizer.model_param_group_index_map
    return any(found[parameter] != place for parameter, place in _true_numbering(optimizer).items())


def _detach(shards: list[Any], installed: list[Any]) -> bool:
    """Replace the fp32 `shards` of a group, here and among its `installed` parameters; whether one had to be.

    A detached shard shares the parameter's memory as the view did, so the inner optimizer's step still lands in the
    model. The attributes that Megatron has set on the shard (about tensor parallelism) are copied.
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
                # The plugin does nothing in fp32 training. Groups of fp32 alone count too: a group with a learning rate
                # of its own may hold the router only.
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
        if undetached or numbering_is_stale(self):
            self.model_param_group_index_map.update(numbering)
        else:
            registry.needless[REPAIR] = "this Megatron treats groups of fp32 and bf16 parameters rightly (#5835)"

    return __init__
