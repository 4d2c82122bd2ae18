"""Turning the plugin on or off between two runs: the distributed optimizer's checkpoints.

A bf16 run's fp32 main copy of a router weight *is* the fp32 router weight. Formats that store state by parameter name
carry it over exactly, given two things that are added here: it is read apart from the model's own (rounded) entry,
and what one data-parallel rank has read into its slice of an fp32 parameter reaches the others. Formats that store
state by gradient buffer, one buffer a dtype, cannot: they are refused before anything is read.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
import torch.distributed as dist

from megatron_fp32_router.errors import CheckpointRefusedError
from megatron_fp32_router.patching.megatron import of_module
from megatron_fp32_router.patching.registry import mismatch, replaces
from megatron_fp32_router.settings import PREFIX

#: A router parameter of the model, not of an optimizer: "decoder.layers.mlp.router.weight".
_ROUTER_PARAMETER: Final = re.compile(r"(?!.*optimizer\.)(.*\.)?router\.(weight|bias)")
#: Its main copy in an optimizer's state that is stored by parameter name.
_ROUTER_MAIN: Final = re.compile(r"optimizer\.state\.(fp32_)?param\.(.*\.)?router\.(weight|bias)")
#: Sharding types that lay optimizer state out by gradient buffer.
_BY_BUFFER: Final = ("dp_zero_gather_scatter", "fully_sharded_bucket_space", "dp_reshardable")


def _refuse(before: str, now: str) -> None:
    module = sys.modules["megatron.core.optimizer.distrib_optimizer"]
    if hasattr(module.DistributedOptimizer, "sharded_param_state_fully_reshardable"):
        flags = "--ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable (sharding type fully_reshardable)"
    else:
        flags = (
            "--ckpt-format torch_dist, without --no-ckpt-fully-parallel-save (sharding type fully_sharded_model_space)"
        )
    mismatch(
        CheckpointRefusedError,
        f"this checkpoint was saved with {before}, and this run has {now}. The checkpoint stores optimizer state by "
        "gradient buffer, and there is one buffer for each dtype, so it does not fit. No optimizer state has been "
        f"loaded. Either set {PREFIX} and {PREFIX}_PROTECT as in the run that saved it; or save once in that run with "
        f"{flags}, which stores it by parameter name, and resume from that ({of_module(module)}); or go on without "
        "optimizer state (--no-load-optim).",
    )


def _refuse_remainders(key: str, before: Any, now: Any) -> None:
    mismatch(
        CheckpointRefusedError,
        f"this checkpoint has {key} in {_said({before})}, and this run has it in {_said({now})}: a precision-aware "
        "optimizer with store_param_remainders keeps the lower 16 bits (int16) of a bf16 parameter's main copy, and "
        f"nothing of an fp32 one's. No optimizer state has been loaded. Either set {PREFIX} and {PREFIX}_PROTECT as in "
        "the run that saved it; or save once in that run with store_param_remainders=False in its OptimizerConfig, "
        "after a resume without optimizer state; or go on without it here (--no-load-optim).",
    )


def _said(dtypes: set[Any]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _leaves(value: Any, name: Any = None) -> Iterator[tuple[Any, Any]]:
    """(last key, value) of everything in nested dictionaries and lists."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, key)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item, name)
    else:
        yield name, value


def refuse_other_buffers(original: Callable[..., Any]) -> Callable[..., Any]:
    """dist_checkpointing.load: refuse optimizer state that another choice of fp32 parameters has laid out.

    Every rank compares the dtypes of the routers it trains with those that the checkpoint's metadata names; tensors are
    not read.

    Raises:
        CheckpointRefusedError: they differ, and the checkpoint's optimizer state depends on them.
    """

    @replaces(original)
    def load(sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        leaves = list(_leaves(sharded_state_dict))
        routers = {
            entry.key: entry.data.dtype
            for _, entry in leaves
            if _ROUTER_PARAMETER.fullmatch(str(getattr(entry, "key", "")))
            and isinstance(entry.data, torch.Tensor)
            and entry.data.requires_grad  # a frozen one lies in no gradient buffer
        }
        mains = {
            entry.key: entry.data.dtype
            for _, entry in leaves
            if _ROUTER_MAIN.fullmatch(str(getattr(entry, "key", ""))) and isinstance(entry.data, torch.Tensor)
        }
        by_buffer = any(name == "param_state_sharding_type" and kind in _BY_BUFFER for name, kind in leaves)
        if mains or (routers and by_buffer):
            saved = sys.modules["megatron.core.dist_checkpointing.serialization"].load_tensors_metadata(checkpoint_dir)
            # torch would read remainders as if they were weights, and weights as if they were remainders.
            for key, dtype in mains.items():
                if key in saved and saved[key].dtype.is_floating_point != dtype.is_floating_point:
                    _refuse_remainders(key, saved[key].dtype, dtype)
        if routers and by_buffer:
            before = {key: saved[key].dtype for key in routers if key in saved}
            changed = [key for key in before if (before[key] == torch.float32) != (routers[key] == torch.float32)]
            if changed:
                _refuse(
                    f"{changed[0]} in {_said({before[key] for key in changed})}",
                    f"it in {_said({routers[key] for key in changed})}",
                )
        return original(sharded_state_dict, checkpoint_dir, *args, **kwargs)

    return load


def refuse_other_buffers_legacy(original: Callable[..., None]) -> Callable[..., None]:
    """DistributedOptimizer.load_parameter_state_from_dp_zero: the same for the legacy format.

    Only the first data-parallel rank has the file's content; the others would wait for it forever, so it tells them.

    Raises:
        CheckpointRefusedError: the file's buffers have other dtypes than this run's.
    """

    @replaces(original)
    def load_parameter_state_from_dp_zero(self: Any, state_dict: Any, *args: Any, **kwargs: Any) -> None:
        here = _dtypes(dict(enumerate(self.gbuf_ranges)))
        there: list[Any] = [None]
        group = self.data_parallel_group_gloo
        if group.rank() == 0 and isinstance(state_dict, dict):
            there = [_dtypes(state_dict)]
        dist.broadcast_object_list(there, src=dist.get_global_rank(group, 0), group=group)
        # Quantized parameters have buffers that Megatron itself splits and joins while it loads.
        quantized = any(dtype == torch.uint8 for dtypes in (here, there[0] or ()) for dtype in dtypes)
        if there[0] is not None and there[0] != here and not quantized:
            _refuse(f"optimizer buffers for {_said(set(there[0]))} parameters", f"some for {_said(set(here))}")
        original(self, state_dict, *args, **kwargs)

    return load_parameter_state_from_dp_zero


def _dtypes(buffers: dict[Any, Any]) -> list[Any]:
    """The parameter dtype of every gradient buffer, in order. Keys that are no numbers are Megatron's notes."""
    return [
        dtype[0]
        for index in sorted(index for index in buffers if isinstance(index, int))
        for dtype in buffers[index]  # (of the parameters, of the gradients)
    ]


def read_apart_from_the_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """DistributedOptimizer.sharded_param_state_fs_model_space: main copies of fp32 parameters in memory of their own.

    Distributed checkpoints are read in place. An fp32 parameter is its own main copy, so the model's entry, which a
    run without the plugin has rounded to bf16, and the exact one would be read into the same memory, in any order.
    """

    @replaces(original)
    def sharded_param_state_fs_model_space(
        self: Any, model_sharded_state_dict: Any, is_loading: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        state = original(self, model_sharded_state_dict, is_loading, *args, **kwargs)
        if is_loading:
            own = {shard.data_ptr() for group in self.shard_fp32_groups for shard in group}
            for tensors in state.values():
                entry = tensors.get("fp32_param")
                if entry is not None and entry.data is not None and entry.data.data_ptr() in own:
                    entry.data = entry.data.detach().clone()
        return state

    return sharded_param_state_fs_model_space


def spread_loaded_weights(original: Callable[..., None]) -> Callable[..., None]:
    """DistributedOptimizer.load_state_dict: gather fp32 parameters after their slices have been loaded.

    Megatron loads the whole of every parameter from the model's entries and its own slice once more from the
    optimizer's. Where the two differ, the first forward would run with the model's on all other ranks.
    """

    @replaces(original)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        original(self, state_dict)
        if "param_state" not in state_dict or not (self.config.bf16 or self.config.fp16):
            return
        group = getattr(self, "data_parallel_group", None)
        if group is None or group.size() == 1:
            return
        for buffer in self.buffers:
            # The same on every rank of the group, whatever each has a slice of.
            if buffer.param_dtype == torch.float32:
                for bucket in buffer.buckets:
                    slices = bucket.param_data.chunk(group.size())
                    dist.all_gather_into_tensor(bucket.param_data, slices[group.rank()], group=group)

    return load_state_dict
