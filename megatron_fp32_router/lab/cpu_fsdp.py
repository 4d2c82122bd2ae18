"""What Megatron-FSDP asks of CUDA beside what cpu.py answers."""

from __future__ import annotations

import contextlib
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import torch

from megatron_fp32_router.lab import cpu, cpu_gloo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Where Megatron-FSDP gathers and reduces.
BUFFERS: Final = "megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer"


def _at_once(collective: Callable[..., Any]) -> Callable[..., cpu_gloo.Done]:
    def call(*args: Any, async_op: bool = False, **kwargs: Any) -> cpu_gloo.Done:
        collective(*args, **kwargs)
        return cpu_gloo.Done()

    return call


@contextlib.contextmanager
def _one_by_one(*args: Any, **kwargs: Any) -> Iterator[cpu_gloo.Done]:
    """Stand in for torch's _coalescing_manager, in which Megatron-FSDP gathers and reduces the groups of a unit.

    NCCL uses each tensor's own dtype in such a call (torch's ProcessGroupNCCL.cpp). Gloo uses one dtype for all: with
    fp32 router parameters among bf16 ones it returns wrong bits, without an error.
    """
    with cpu.undone_after():
        for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
            cpu.replace(torch.distributed, name, _at_once(getattr(torch.distributed, name)))
        yield cpu_gloo.Done()


def collectives_one_by_one(buffers: Any) -> None:
    """Repair the module BUFFERS for gloo, until `cpu.undo()`."""
    cpu.replace(buffers, "_coalescing_manager", _one_by_one)


@contextlib.contextmanager
def megatron_fsdp() -> Iterator[None]:
    """Let Megatron-FSDP (0.15 and later; torch 2.13 lacks what 0.14 needs) build and train, while this is open."""
    with cpu.undone_after():
        # A number, as Megatron-FSDP makes a torch.device("cuda:…") of it.
        cpu.replace(torch.cuda, "current_device", lambda: 0)
        collectives_one_by_one(import_module(BUFFERS))
        yield
