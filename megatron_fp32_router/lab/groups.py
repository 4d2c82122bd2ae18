"""Making a Megatron importable here, and making, seeding and completely removing its process groups."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import os
import random
import sys
import weakref
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist

from megatron_fp32_router.lab import compat, cpu
from megatron_fp32_router.lab.recipe import LabError, Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator

#: DDP-wrapped chunks that exist now; `parallel` makes them let go of its groups when it ends.
chunks_in_training: Final[weakref.WeakSet[Any]] = weakref.WeakSet()


def prepare(megatron: str | Path | None = None) -> None:
    """Make a Megatron importable on this machine. Call it before anything of Megatron is imported. Idempotent.

    Args:
        megatron: the directory that holds `megatron/`, put first on sys.path; None: whatever is importable.

    Raises:
        LabError: there is no Megatron there, or another one has been imported already.
    """
    tree = None if megatron is None else Path(megatron).resolve()
    if tree is not None and not (tree / "megatron" / "core").is_dir():
        raise LabError(f"no megatron/core below {tree}")
    loaded = sys.modules.get("megatron.core")
    if loaded is not None and tree is not None:
        home = Path(str(loaded.__file__)).resolve().parents[2]
        if home != tree:
            raise LabError(
                f"Megatron was imported from {home} before lab.prepare({str(tree)!r}): one process, one Megatron"
            )
    if tree is not None and str(tree) not in sys.path[:1]:
        sys.path.insert(0, str(tree))
        parent = sys.modules.get("megatron")
        if loaded is None and parent is not None and str(tree / "megatron") not in list(parent.__path__):
            raise LabError(f"a package `megatron` was imported from {list(parent.__path__)} before lab.prepare")
    compat.before_import(tree)
    if not torch.cuda.is_available():
        cpu.pretend()


def device() -> torch.device:
    """Where the laboratory's tensors live."""
    if cpu.is_pretending() or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


# Process groups --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def parallel(recipe: Recipe, *, rank: int = 0, store: Any = None, timeout: float = 120.0) -> Iterator[None]:
    """Open the process groups of `recipe`, seeded, and remove all of them at the end.

    Args:
        rank: of this process.
        store: torch's FileStore or the like, where several ranks meet; one rank needs none (and no port and
            no environment variable).
        timeout: seconds a collective may take.

    Raises:
        LabError: several ranks without a store, or a process group is open already.
    """
    from datetime import timedelta

    if store is None:
        if recipe.world_size > 1:
            raise LabError(f"{recipe.world_size} ranks need a store to meet at: use lab.run_ranks")
        store = torch._C._distributed_c10d.HashStore()
    if dist.is_initialized():
        raise LabError("a process group is open already")
    backend = "gloo"
    if not cpu.is_pretending() and torch.cuda.device_count() >= recipe.world_size:
        backend = "cpu:gloo,cuda:nccl"  # NCCL refuses two ranks on one GPU
        torch.cuda.set_device(rank)
    excepthook = sys.excepthook
    _set_imports_aside()
    _leave_garbage_to_the_parent()
    gc.collect()  # an earlier model that was dropped after its groups still holds some of them
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=recipe.world_size, timeout=timedelta(seconds=timeout)
    )
    try:
        with layout(recipe):
            yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        # init_process_group puts one more "[rank0]:" in front of tracebacks each time it is called.
        sys.excepthook = excepthook
        gc.collect()


@functools.cache
def _set_imports_aside() -> None:
    """Import what a training needs, and take it out of garbage collections: it makes each half a second longer.

    Old models have to be collected before new groups are made; a million objects of torch and Megatron need not be.
    """
    for name in ("models.gpt.gpt_model", "distributed", "optimizer", "pipeline_parallel.schedules"):
        import_module(f"megatron.core.{name}")
    gc.collect()
    gc.freeze()


@functools.cache
def _leave_garbage_to_the_parent() -> None:
    """Turn garbage collection off in forked processes; Megatron forks those that write a checkpoint.

    A gloo group of an earlier layout waits for its threads to end when it is collected. A fork does not have these
    threads, and would wait for ever.
    """
    os.register_at_fork(after_in_child=gc.disable)


@contextlib.contextmanager
def layout(recipe: Recipe) -> Iterator[None]:
    """Megatron's groups for `recipe` among the ranks that there are, seeded. `parallel` opens one.

    Ranks inside `parallel` can open several layouts of the same size, one after another: call `leave_layout` first, to
    close that of `parallel`. Models of an earlier layout must not be used any more.
    """
    state = import_module("megatron.core.parallel_state")
    # Newer releases write each loss scale into the tensor of the previous one, whatever its shape.
    scaler = import_module("megatron.core.transformer.moe.moe_utils").MoEAuxLossAutoScaler
    scale = copy.deepcopy(scaler.main_loss_backward_scale)
    try:
        compat.after_import()
        state.initialize_model_parallel(
            tensor_model_parallel_size=recipe.tensor_parallel,
            pipeline_model_parallel_size=recipe.pipeline_parallel,
            virtual_pipeline_model_parallel_size=recipe.virtual_pipeline,
            expert_model_parallel_size=recipe.expert_parallel,
        )
        seed(recipe.seed)
        yield
    finally:
        leave_layout()
        scaler.main_loss_backward_scale = scale


def leave_layout() -> None:
    """Take Megatron's groups down, and make chunks in training let go of them. Idempotent."""
    for chunk in list(chunks_in_training):
        _let_go_of_groups(chunk)
    state = import_module("megatron.core.parallel_state")
    state.destroy_model_parallel()
    _forget_groups(state)


def _let_go_of_groups(chunk: Any) -> None:
    """Break the reference cycles of a trained chunk that the garbage collector does not see: they pass through C++.

    A token dispatcher keeps its last `probs`; their graph ends in DDP's gradient hooks, which hold DDP, which holds
    the dispatcher and every process group. The hooks that gather parameters ahead of a forward keep DDP as well.
    RotaryEmbedding's forward is an lru_cache with `self` in its keys.
    """
    for handle in getattr(chunk, "remove_forward_pre_hook_handles", {}).values():
        handle.remove()
    for module in chunk.modules():
        if hasattr(type(module).forward, "cache_clear"):
            type(module).forward.cache_clear()
        helpers = (value for value in vars(module).values() if hasattr(value, "__dict__"))
        for owner in (module, *helpers):
            for name, value in list(vars(owner).items()):
                if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                    setattr(owner, name, value.detach())


def seed(value: int) -> None:
    """Seed everything that a build draws from; two builds after the same seed are alike."""
    import numpy as np

    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    import_module("megatron.core.tensor_parallel.random").model_parallel_cuda_manual_seed(value)


def _forget_groups(state: Any) -> None:
    """Drop what destroy_model_parallel keeps: groups, each of which owns threads, and lists of the ranks in a group.

    With an old list, a rank would believe to be in a group that the next layout does not put it into.
    """
    for name, value in list(vars(state).items()):
        several = isinstance(value, list | tuple) and any(isinstance(v, dist.ProcessGroup) for v in value)
        if several or isinstance(value, dist.ProcessGroup) or name.endswith("_GLOBAL_RANKS"):
            setattr(state, name, None)
        elif isinstance(value, dict) and any(isinstance(v, dist.ProcessGroup) for v in value.values()):
            value.clear()
    # From 0.18 on. The tracker of logged losses holds groups too, and has the length of the first model.
    losses = sys.modules.get("megatron.core.transformer.moe.moe_logging")
    if losses is not None:
        losses._MOE_METRICS_TRACKER = None  # type: ignore[attr-defined]
