"""Refit: router weights from a training in fp32 to a rollout in bf16, or the other way round (0.16 and later).

Megatron's refit sends bytes straight into the destination's tensor. Here the sender converts a router parameter to the
receiver's dtype first: to bf16 rounded to nearest, to fp32 exactly. The receiver needs no plugin.

No collective is added. A rank that plans knows the dtypes on both sides, since Megatron gathers them for the plan. Up
to 0.18 only the first rank plans, and sends every rank its operations. So in the sender's operations the receiver's
dtype is written behind the parameter's name, where the sender is known to run the plugin, which reads it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

from megatron_fp32_router.casts.router import is_protected
from megatron_fp32_router.errors import CombinationRefusedError
from megatron_fp32_router.optimizers.refusing import plain
from megatron_fp32_router.patching.registry import mismatch, registry, replaces
from megatron_fp32_router.settings import PREFIX

#: Between a parameter's name and the dtype to send it in.
_AS: Final = " as "
#: On what Megatron gathers about a tensor: its rank reads such names.
_CONVERTS: Final = "converted_by_fp32_router"
#: On an operation, once its rank has read the name.
_SENT_AS: Final = "sent_as"


def _is_router(name: str) -> bool:
    return name.endswith(("router.weight", "router.bias"))


def say_who_converts(original: Callable[..., Any]) -> Callable[..., Any]:
    """extract_param_metadata, for what the planner gathers about each tensor of this rank."""

    @replaces(original)
    def extract_param_metadata(param: Any, param_name: str, *args: Any, **kwargs: Any) -> Any:
        metadata = original(param, param_name, *args, **kwargs)
        # Not if the function that reads the names could not be patched and the user chose to go on.
        if _is_router(metadata.name) and "refit-convert" in registry.replacements:
            setattr(metadata, _CONVERTS, True)
        return metadata

    return extract_param_metadata


def name_dtypes(original: Callable[..., Any]) -> Callable[..., Any]:
    """select_src_metadata_balanced, which the planner calls once for each destination tensor.

    Raises:
        CombinationRefusedError: the dtypes differ and the sending rank runs without the plugin.
    """

    @replaces(original)
    def select_src_metadata_balanced(src_meta_list: Any, dst_metadata: Any, dst_rank: int) -> Any:
        source = original(src_meta_list, dst_metadata, dst_rank)
        if not _is_router(str(dst_metadata.name)):
            return source
        if hasattr(source, _CONVERTS):
            return dataclasses.replace(source, name=f"{source.name}{_AS}{plain(dst_metadata.dtype)}")
        if source.dtype != dst_metadata.dtype:
            mismatch(
                CombinationRefusedError,
                f"refit of {dst_metadata.name} from {plain(source.dtype)} to {plain(dst_metadata.dtype)}: it sends "
                f"bytes, and the sending rank {source.owner_rank}, which would have to convert them, runs without "
                f"megatron-fp32-router. Turn it on there too ({PREFIX}_PROTECT=buffers leaves the weights there as "
                f"they are), or set {PREFIX}_PROTECT=buffers on the receiving side.",
            )
        return source

    return select_src_metadata_balanced


class _Sender:
    """What execute_reshard_plan asks of a source model: the tensors to send, by name."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self._tensors = tensors

    def named_parameters(self, recurse: bool = True) -> Iterator[tuple[str, Any]]:
        yield from self._tensors.items()

    def named_modules(self) -> tuple[()]:
        """Where 0.18 and later look for buffers, which are among the tensors already."""
        return ()


def _tensors_of(module: Any) -> dict[str, Any]:
    """What Megatron sends of `module`; 0.18 and later keep a list of it, with buffers."""
    listed = getattr(sys.modules["megatron.core.resharding.utils"], "get_refit_tensor_dict", None)
    return dict(module.named_parameters(recurse=True) if listed is None else listed(module))


def _refuse_unnamed(name: str) -> None:
    mismatch(
        CombinationRefusedError,
        f"refit would send {name} in float32, and its plan does not say in which dtype it is received: it was made by "
        "a rank that runs without megatron-fp32-router (up to 0.18 the first one plans for all), or before the plugin "
        f"was turned on. Turn it on there, or set {PREFIX}_PROTECT=buffers here. Nothing has been sent by this rank.",
    )


def convert(original: Callable[..., None]) -> Callable[..., None]:
    """execute_reshard_plan: send router parameters in the dtype that the plan names.

    Raises:
        CombinationRefusedError: the plan names none for an fp32 router parameter.
    """

    @replaces(original)
    def execute_reshard_plan(plan: Any, src_module: Any, dst_module: Any, *args: Any, **kwargs: Any) -> None:
        if src_module is None or not any(_is_router(op.param_name.partition(_AS)[0]) for op in plan.send_ops):
            original(plan, src_module, dst_module, *args, **kwargs)
            return
        tensors = _tensors_of(src_module)
        send_ops = []
        for op in plan.send_ops:
            name, named, dtype = op.param_name.partition(_AS)
            if named:  # only the first time: then the plan is as Megatron would have made it
                op.param_name = name
                setattr(op, _SENT_AS, getattr(torch, dtype))
            sent_as, tensor = getattr(op, _SENT_AS, None), tensors.get(name)
            if tensor is not None and sent_as is None and _is_router(name) and is_protected(tensor):
                _refuse_unnamed(name)
            if tensor is not None and sent_as is not None and tensor.dtype != sent_as:
                op = dataclasses.replace(op, param_name=f"{name}{_AS}{plain(sent_as)}")
                if op.param_name not in tensors:
                    tensors[op.param_name] = tensor.detach().to(sent_as)
            send_ops.append(op)
        original(dataclasses.replace(plan, send_ops=send_ops), _Sender(tensors), dst_module, *args, **kwargs)

    return execute_reshard_plan
