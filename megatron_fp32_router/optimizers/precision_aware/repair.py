"""The precision-aware optimizer's checkpoints with fp32 router parameters.

There FusedAdam holds the main copies. It updates an fp32 parameter in place. It makes a main copy of it too, which it
never updates; that stale copy is what Megatron saves, and what it loads into (NVIDIA/Megatron-LM #7338).
Here an fp32 parameter is its own main copy, as it is in the other optimizers.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch

from megatron_fp32_router.log import say
from megatron_fp32_router.patching.registry import replaces


def _holds_main_copies(optimizer: Any) -> bool:
    """Whether FusedAdam holds a distributed optimizer's main copies."""
    config = optimizer.config
    # Where fp8 recipes leave the main copies to Megatron (0.13 and later), nothing is wrong.
    flag = getattr(config, "use_precision_aware_optimizer", False)
    held = getattr(config, "use_precision_aware_optimizer_no_fp8_or_ds_fp8", flag)
    # HybridDeviceOptimizer, which optimizers/offload is about, has no such method.
    return held and hasattr(optimizer.optimizer, "set_scaled_state")


def _is_offloaded(optimizer: Any) -> bool:
    return hasattr(optimizer.optimizer, "param_to_inner_param")


def _updated_in_place(optimizer: Any, model_param: Any) -> Any:
    """This rank's slice of an fp32 parameter whose main copy FusedAdam believes to hold, or None."""
    if not _holds_main_copies(optimizer):
        return None
    group, place = optimizer.model_param_group_index_map[model_param]
    shard = optimizer.optimizer.param_groups[group]["params"][place]
    return shard if shard.dtype == torch.float32 else None


def save_the_parameter(original: Callable[..., Any]) -> Callable[..., Any]:
    """DistributedOptimizer._get_main_param_and_optimizer_states, which every checkpoint format is made of."""

    @replaces(original)
    def _get_main_param_and_optimizer_states(self: Any, model_param: Any) -> Any:
        tensors = original(self, model_param)
        shard = _updated_in_place(self, model_param)
        if shard is not None:
            tensors["param"] = shard
        return tensors

    return _get_main_param_and_optimizer_states


def load_the_parameter(original: Callable[..., None]) -> Callable[..., None]:
    """DistributedOptimizer._set_main_param_and_optimizer_states, by which every format is loaded."""

    @replaces(original)
    def _set_main_param_and_optimizer_states(self: Any, model_param: Any, tensors: Any) -> None:
        shard = _updated_in_place(self, model_param)
        if shard is None:
            original(self, model_param, tensors)
            return
        original(self, model_param, {name: value for name, value in tensors.items() if name != "param"})
        shard.data.copy_(tensors["param"])

    return _set_main_param_and_optimizer_states


#: Formats that gather state on one rank.
_DP_ZERO = ("torch", "dp_zero_gather_scatter")
_LOAD_FROM_DP_ZERO = "load_parameter_state_from_dp_zero"
#: Formats that pass through fp32 buffers of a whole group of ranks.
_GATHERED = (*_DP_ZERO, "fully_reshardable")


def _cannot_be_loaded(optimizer: Any, checkpoint_format: str) -> str | None:
    """Why Megatron itself will not load what it is about to save, as the end of a sentence, or None."""

    def names(method: str) -> set[str]:
        code = getattr(inspect.unwrap(getattr(type(optimizer), method)), "__code__", None)
        return set(getattr(code, "co_names", ()))

    if _is_offloaded(optimizer):
        if checkpoint_format not in _DP_ZERO or "_sync_hdo_state_to_sub_optimizers" in names(_LOAD_FROM_DP_ZERO):
            return None
        return (
            "it keeps what it loads from the offloaded optimizer, whose next step then writes the weights from before "
            "the load back into the whole model"
        )
    setting = names("_set_main_param_and_optimizer_states")
    if getattr(optimizer.optimizer, "store_param_remainders", False):
        # A Megatron in which this is repaired would have to name one of these.
        repaired = {"int16", "store_param_remainders"}
        if checkpoint_format in _GATHERED and not repaired & (setting | names(_LOAD_FROM_DP_ZERO)):
            return "it makes fp32 numbers of the int16 remainders of main copies, and refuses those when it loads"
        if not repaired & names("load_state_dict"):  # 0.11, 0.12
            return "it prepares fp32 main copies to load into, and TransformerEngine refuses them"
    if checkpoint_format == "dp_reshardable" and "Tensor" not in setting:  # 0.15, 0.16
        return "it hands a note of its own to TransformerEngine as if that were a tensor"
    return None


def warn_before_a_save_in_vain(original: Callable[..., Any]) -> Callable[..., Any]:
    """DistributedOptimizer.sharded_state_dict and save_parameter_state: warn of a save that Megatron cannot load.

    That concerns every parameter, with the plugin off and on alike, so it is not refused.
    """
    parameters = inspect.signature(original)

    @replaces(original)
    def saving(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(self, *args, **kwargs).arguments
        if "filename" in given:
            kind = "torch"
        else:
            asked = (given.get("metadata") or {}).get("distrib_optim_sharding_type")
            kind = given.get("sharding_type") or asked or "fully_sharded_model_space"
        stub = getattr(self, "is_stub_optimizer", False)
        asked_of = not (stub or given.get("is_loading")) and (_holds_main_copies(self) or _is_offloaded(self))
        why = _cannot_be_loaded(self, kind) if asked_of else None
        if why is not None:
            say(
                logging.WARNING,
                f"this Megatron cannot load optimizer state that it saves in the format {kind} with "
                f"use_precision_aware_optimizer: {why}. That is so without this plugin too. A resume will need "
                "--no-load-optim. Where OptimizerConfig has store_param_remainders, False avoids remainders; "
                "docs/resume.md says which formats resume.",
                once=True,
            )
        return original(self, *args, **kwargs)

    return saving
