"""Turning the plugin on or off between two runs: the distributed optimizer's checkpoints.

A bf16 run's fp32 main copy of a router weight *is* the fp32 router weight. Formats that store state by parameter name
carry it over exactly, given two things that are added here: it is read apart from the model's own (rounded) entry,
and what one data-parallel rank has read into its slice of an fp32 parameter reaches the others. Formats that store
state by gradient buffer, one buffer a dtype, are read from where the other setting has put it (mapping.py).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_fp32_router.errors import CheckpointRefusedError
from megatron_fp32_router.optimizers.distributed import mapping, reading
from megatron_fp32_router.patching.megatron import of_module
from megatron_fp32_router.patching.registry import mismatch, replaces


def _refuse(reason: str) -> None:
    """`reason`: what _misfit says, on whichever rank."""
    module = sys.modules["megatron.core.optimizer.distrib_optimizer"]
    if hasattr(module.DistributedOptimizer, "sharded_param_state_fully_reshardable"):
        flags = "--ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable (sharding type fully_reshardable)"
    else:
        flags = (
            "--ckpt-format torch_dist, without --no-ckpt-fully-parallel-save (sharding type fully_sharded_model_space)"
        )
    mismatch(
        CheckpointRefusedError,
        f"this checkpoint stores optimizer state by gradient buffer, and its buffers do not fit this run. {reason}. No "
        "optimizer state has been loaded. Resume with the model, the parallel sizes and the bucket size "
        "(--ddp-bucket-size, --overlap-grad-reduce) of the run that saved it; or save once in that run with "
        f"{flags}, which stores it by parameter name, and resume from that ({of_module(module)}); or go on without "
        "optimizer state (--no-load-optim).",
    )


def _misfit(found: dict[str, int], here: dict[str, int], there: dict[str, int] | None) -> str:
    """What was `found` in a checkpoint, and what was expected: `here`, or `there` if it can be computed."""
    expected = _said(here, found)
    if there is None:
        expected += (
            "; this Megatron lays them out in a way that the plugin does not know, so not with the other setting"
        )
    elif there != here:
        expected += f"; or, from a run with the plugin's other setting: {_said(there, found)}"
    return f"Found: {_said(found, here)}. Expected: {expected}"


def _said(buffers: dict[str, int], others: dict[str, int]) -> str:
    """The first of `buffers` that `others` lack, and how many more of them there are."""
    different = [f"{name} of {numel} elements" for name, numel in buffers.items() if others.get(name) != numel]
    more = f" and {len(different) - 2} more" if len(different) > 2 else ""
    return (", ".join(different[:2]) + more) or "no other buffer"


def load_across_settings(original: Callable[..., Any]) -> Callable[..., Any]:
    """dist_checkpointing.load: ask for optimizer state where the run that saved it has put it.

    That run may have had the plugin's other setting. What is asked for is changed before anything is read, and what
    was read is given back as it was asked for at first.

    Raises:
        CheckpointRefusedError: on every rank, before anything is read: what some rank needs fits neither setting.
    """
    parameters = inspect.signature(original)

    @replaces(original)
    def load(sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(sharded_state_dict, checkpoint_dir, *args, **kwargs).arguments
        module = sys.modules["megatron.core.dist_checkpointing.serialization"]
        plan = reading.plan(sharded_state_dict, lambda: module.load_tensors_metadata(checkpoint_dir), _misfit)
        problem = plan.problem
        if given.get("validate_access_integrity", True):  # then Megatron compares all ranks' requests, and so do we
            problem = _first_of_all_ranks(problem, given.get("process_group"))
        if problem:
            _refuse(problem)
            return original(sharded_state_dict, checkpoint_dir, *args, **kwargs)
        result = original(plan.asked(sharded_state_dict), checkpoint_dir, *args, **kwargs)
        plan.finish(result[0] if isinstance(result, tuple) else result)  # a tuple where `strict` asks for missing keys
        return result

    return load


def _first_of_all_ranks(problem: str, group: Any) -> str:
    """The problem of the first rank that has one, told to all ranks: otherwise they would wait for it in the load."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return problem
    problems: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group=group)
    return next((f"On rank {rank}: {said}" for rank, said in enumerate(problems) if said), "")


def note_who_asks(original: Callable[..., Any]) -> Callable[..., Any]:
    """DistributedOptimizer.sharded_param_state_dp_reshardable: `load` has to know whose buffers these are."""

    @replaces(original)
    def sharded_param_state_dp_reshardable(
        self: Any, model_sharded_state_dict: Any, is_loading: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        state = original(self, model_sharded_state_dict, is_loading, *args, **kwargs)
        if is_loading:
            state = mapping.Request(state)
            state.optimizer = self
        return state

    return sharded_param_state_dp_reshardable


def load_gathered_across_settings(original: Callable[..., None]) -> Callable[..., None]:
    """DistributedOptimizer.load_parameter_state_from_dp_zero: the same for formats that gather a buffer's state.

    Only the first data-parallel rank has it; the others would wait for it forever, so it tells them.

    Raises:
        CheckpointRefusedError: on every rank of the group: the buffers fit neither setting.
    """

    @replaces(original)
    def load_parameter_state_from_dp_zero(self: Any, state_dict: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("update_legacy_format"):  # from before February 2024, by buffer in another way
            original(self, state_dict, *args, **kwargs)
            return
        group = self.data_parallel_group_gloo
        here, other = mapping.present(self), None
        verdict: list[Any] = ["fits"]
        if group.rank() == 0 and isinstance(state_dict, dict):
            found = mapping.saved_gathered(state_dict)
            # Quantized parameters have buffers that Megatron itself splits and joins while it loads.
            quantized = any("uint8" in name for name in (*found, *mapping.gathered(here)))
            if found != mapping.gathered(here):
                other = mapping.other(self) if mapping.flipped(self) else here
                if other is not None and found == mapping.gathered(other):
                    verdict = ["moved"]
                elif not quantized:
                    there = None if other is None else mapping.gathered(other)
                    verdict = [_misfit(found, mapping.gathered(here), there)]
        dist.broadcast_object_list(verdict, src=dist.get_global_rank(group, 0), group=group)
        if verdict[0] not in ("fits", "moved"):
            _refuse(verdict[0])
        if verdict[0] == "moved" and other is not None:
            state_dict = mapping.gathered_anew(state_dict, other, here)
        original(self, state_dict, *args, **kwargs)
        if verdict[0] == "moved":
            _gather_fp32(self)

    return load_parameter_state_from_dp_zero


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
        if "param_state" in state_dict and (self.config.bf16 or self.config.fp16):
            _gather_fp32(self)

    return load_state_dict


def _gather_fp32(optimizer: Any) -> None:
    """Give every data-parallel rank the fp32 parameters that each has a slice of."""
    group = getattr(optimizer, "data_parallel_group", None)
    if group is None or group.size() == 1:
        return
    for buffer in optimizer.buffers:
        # The same on every rank of the group, whatever each has a slice of.
        if buffer.param_dtype == torch.float32:
            for bucket in buffer.buckets:
                slices = bucket.param_data.chunk(group.size())
                dist.all_gather_into_tensor(bucket.param_data, slices[group.rank()], group=group)
