"""Gloo in the place of NCCL: replacements for what gloo does differently, and one thread for all groups. See cpu.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


def replacements() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, value), for `cpu.replace`."""
    found = [
        (dist, "all_to_all_single", _all_to_all_with_lists(dist.all_to_all_single)),
        (dist, "all_gather", _all_gather_of_unequal_sizes(dist.all_gather)),
    ]
    if dist.is_gloo_available():
        found.append((distributed_c10d, "ProcessGroupGloo", _sharing_a_device(distributed_c10d.ProcessGroupGloo)))
    return found


def _sharing_a_device(real: Any) -> type:
    """A process group whose sockets are served by one thread, which all groups share.

    By default every group has a thread of its own, which wakes up a hundred times a second. Megatron makes sixty groups
    in each process, which waste 6 % of a core; in a process that goes through many layouts, most of a core.
    """

    @functools.cache
    def device() -> Any:
        return real.create_default_device()

    class ProcessGroupGloo(real):  # type: ignore[misc]
        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            options = real._Options()
            options._devices, options._timeout = [device()], timeout
            super().__init__(store, rank, size, options)

    return ProcessGroupGloo


def _all_to_all_with_lists(real: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(real)
    def all_to_all_single(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        **kwargs: Any,
    ) -> Any:
        # Megatron turns split sizes into lists only when they lie on a GPU.
        def as_list(sizes: Any) -> Any:
            return sizes.tolist() if hasattr(sizes, "tolist") else sizes

        return real(output, input, as_list(output_split_sizes), as_list(input_split_sizes), **kwargs)

    return all_to_all_single


class Done:
    """A collective that has ended."""

    def wait(self) -> None: ...


def _all_gather_of_unequal_sizes(real: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(real)
    def all_gather(tensor_list: Any, tensor: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        # NCCL can gather unequal sizes; gloo would write out of bounds.
        if len({part.numel() for part in tensor_list}) == 1:
            return real(tensor_list, tensor, group=group, async_op=async_op)
        tensor_list[dist.get_rank(group)].copy_(tensor)
        for rank, part in enumerate(tensor_list):
            if part.numel():
                dist.broadcast(part, group=group, group_src=rank)
        return Done() if async_op else None

    return all_gather
