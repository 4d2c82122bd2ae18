"""A router tensor that is below fp32 in a training: which router has it, and what has changed it as far as is known.

Imported only where there is such a tensor.
"""

from __future__ import annotations

import sys
from typing import Any, Final

import torch

from megatron_fp32_router.casts.layer import layer_of
from megatron_fp32_router.casts.router import below_fp32, wrapped
from megatron_fp32_router.errors import UnprotectedRouterError
from megatron_fp32_router.log import rank
from megatron_fp32_router.patching.registry import mismatch, registry
from megatron_fp32_router.settings import PREFIX

#: Names and dtypes of tensors that were warned of: one warning each, and not one for every layer.
_warned: Final[set[tuple[str, torch.dtype]]] = set()


def place(router: Any, name: str = "") -> str:
    """For example "layer 61, pipeline stage 3 (the first is 0), rank 24".

    `name`: the router's in its model, where that has not been wrapped yet.
    """
    facts, state = [], sys.modules.get("megatron.core.parallel_state")
    layer = layer_of(router, name or wrapped.get(router, ("",))[0])
    if layer is not None:
        facts.append(f"layer {layer}".replace("layer mtp", "MTP layer"))
    if state is not None and state.model_parallel_is_initialized():
        facts.append(f"pipeline stage {state.get_pipeline_model_parallel_rank()} (the first is 0)")
    return ", ".join([*facts, f"rank {rank()}"])


def refuse(router: Any, name: str, moment: str) -> None:
    """Raise, or warn once: `router` has a tensor of that name below fp32.

    Raises:
        UnprotectedRouterError: under on_mismatch="raise".
    """
    dtype = getattr(router, name).dtype
    if registry.settings.on_mismatch == "warn":
        if (name, dtype) in _warned:
            return
        _warned.add((name, dtype))
    mismatch(
        UnprotectedRouterError,
        f"router tensor {name!r} is {dtype} {moment}, and should be fp32: {_whose(router)}. {_cause(router, name)} "
        f"{PREFIX}_ON_MISMATCH=warn trains on as it is, and names one router only.",
    )


def refuse_handed(name: str, dtype: torch.dtype, attribute: str) -> None:
    """Raise, or warn once: get_updated_expert_bias was given a tensor below fp32. Which router has it must be searched.

    Raises:
        UnprotectedRouterError: under on_mismatch="raise".
    """
    for router in list(wrapped):
        found = getattr(router, attribute, None)
        if found is not None and below_fp32(found.dtype):
            refuse(router, attribute, "at the balance update")
            return
    mismatch(
        UnprotectedRouterError,
        f"{name} is {dtype} at the balance update (rank {rank()}), and should be fp32: in fewer bits the update cannot "
        f"be exact. No model that the plugin saw wrapped has such a tensor now. Either the model was wrapped before "
        "megatron_fp32_router was active: import the plugin before the model is built. Or who calls "
        "get_updated_expert_bias has cast it: hand over the router's own tensors. "
        f"{PREFIX}_ON_MISMATCH=warn trains on as it is.",
    )


def _whose(router: Any) -> str:
    name = wrapped[router][0] if router in wrapped else f"a {type(router).__qualname__}"
    return f"{name} ({place(router)})"


def _cause(router: Any, name: str) -> str:
    tensor = getattr(router, name)
    then = wrapped[router][1].get(name) if router in wrapped else None
    if then is None:
        return (
            "Either the model was built or cast before megatron_fp32_router was active: import the plugin before the "
            "model is built, or call megatron_fp32_router.protect_model(model) before DDP and the optimizer. Or "
            f"load_state_dict(assign=True) has put a {tensor.dtype} tensor of the state there: load without assign."
        )
    if then() is tensor:
        return (
            "It was fp32 when the model was wrapped, and is the same tensor object still: something has assigned to "
            "its .data since, as a cast does that goes around the plugin. Leave the router out of that."
        )
    return (
        "It was fp32 when the model was wrapped, and another tensor is in its place now. "
        f"load_state_dict(assign=True) with a {tensor.dtype} state does that: load without assign, which copies into "
        "the fp32 tensor. So does whatever assigns a tensor of its own, or a cast that goes around the plugin: leave "
        "the router out of that."
    )
