"""Saving, loading and comparing the whole state of a training, in every format that this Megatron has.

Formats are named as Megatron names them: "torch" (the legacy files), "torch_dist" (distributed checkpoints of the
plain optimizers), "torch_dcp" (torch's own, for FSDP2) and, for the distributed optimizer, its sharding types inside
torch_dist.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_fp32_router.lab import compat

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from megatron_fp32_router.lab.train import Lab

_DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer"
#: In the order in which Megatron introduced them.
_SHARDING_TYPES = (
    "dp_zero_gather_scatter",
    "fully_sharded_bucket_space",
    "fully_sharded_model_space",
    "dp_reshardable",
    "fully_reshardable",
)


def formats(optimizer: str) -> list[str]:
    """The formats that this Megatron has for `optimizer`, "plain" or "distributed" as in Recipe, with DDP."""
    if optimizer == "plain":
        return ["torch", "torch_dist"]
    source = Path(str(import_module(_DISTRIBUTED).__file__)).read_text(encoding="utf-8")
    # Only what it can load: 0.15 and later still name bucket space in a warning, and then fail on it.
    return ["torch", *(name for name in _SHARDING_TYPES if re.search(rf"if sharding_type == '{name}':", source))]


def save(room: Lab, folder: Path, checkpoint_format: str) -> None:
    """Write model and optimizer below `folder`, which all ranks share.

    `checkpoint_format` is one of `formats`. Every rank calls it.
    """
    gather(room)
    with _step_kept_in_groups(room):
        if checkpoint_format == "torch":
            _save_legacy(room, folder)
        elif checkpoint_format == "torch_dcp":
            state = {name: model.state_dict_for_save_checkpoint() for name, model in _models(room)}
            state["optimizer"] = room.optimizer.state_dict()
            files: Any = import_module("torch.distributed.checkpoint")
            files.save(state, storage_writer=files.FileSystemWriter(folder))
        else:
            if dist.get_rank() == 0:
                folder.mkdir(parents=True, exist_ok=True)
            dist.barrier()
            state = _sharded_state(room, checkpoint_format, loading=False)
            import_module("megatron.core.dist_checkpointing").save(state, str(folder))


def load(room: Lab, folder: Path, checkpoint_format: str) -> None:
    """Read what `save` has written into a model and an optimizer as `build` made them. Every rank calls it."""
    with _step_kept_in_groups(room):
        if checkpoint_format == "torch":
            _load_legacy(room, folder)
            return
        if checkpoint_format == "torch_dcp":
            # torch loads into the tensors that it is given. The chain's state_dict takes no is_loading, its optimizer's
            # does.
            loaded: dict[str, Any] = {name: model.state_dict() for name, model in _models(room)}
            (optimizer,) = optimizers(room)
            loaded["optimizer"] = optimizer.state_dict(is_loading=True)
            for group in loaded["optimizer"]["optimizer"]["param_groups"]:
                # Only what is there is loaded, and FusedAdam has no `step` before its first step.
                group.setdefault("step", 0)
            files: Any = import_module("torch.distributed.checkpoint")
            files.load(loaded, storage_reader=files.FileSystemReader(folder))
        else:
            state = _sharded_state(room, checkpoint_format, loading=True)
            loaded = import_module("megatron.core.dist_checkpointing").load(state, str(folder))
        for chunk, (name, _) in zip(room.chunks, _models(room), strict=True):
            chunk.load_state_dict(loaded[name])  # does nothing for FSDP2, which has loaded in place
        room.optimizer.load_state_dict(loaded["optimizer"])


def gather(room: Lab) -> None:
    """Bring every parameter up to date on every rank, as Megatron's training does before it saves.

    With overlap, what the last step changed in another rank's slice is gathered only in the next forward.
    """
    if room.recipe.overlap and room.recipe.optimizer == "distributed":
        for chunk in room.chunks:
            chunk.disable_forward_pre_hook()
            chunk.enable_forward_pre_hook()


def _models(room: Lab) -> Iterator[tuple[str, Any]]:
    """(key in a checkpoint, chunk without its DDP wrapper), named as Megatron's training names them.

    Older releases ask for the virtual pipeline's stage to find out which layers a chunk has.
    """
    state = import_module("megatron.core.parallel_state")
    for index, chunk in enumerate(room.chunks):
        if len(room.chunks) > 1:
            state.set_virtual_pipeline_model_parallel_rank(index)
        yield (f"model{index}" if len(room.chunks) > 1 else "model"), chunk.module


def _sharded_state(room: Lab, checkpoint_format: str, *, loading: bool) -> dict[str, Any]:
    state: dict[str, Any] = {name: model.sharded_state_dict() for name, model in _models(room)}
    # A copy: newer releases write into the metadata they are given.
    metadata: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    arguments: dict[str, Any] = {"metadata": metadata}
    if checkpoint_format != "torch_dist":
        metadata["distrib_optim_sharding_type"] = checkpoint_format
        method = import_module(_DISTRIBUTED).DistributedOptimizer.sharded_state_dict
        arguments = compat.signature_kwargs(method, metadata=metadata) or {"sharding_type": checkpoint_format}
    elif not compat.signature_kwargs(optimizers(room)[0].sharded_state_dict, metadata=metadata):
        arguments = {}
    state["optimizer"] = room.optimizer.sharded_state_dict(state, is_loading=loading, **arguments)
    return state


# The legacy format: every rank has files of its own -----------------------------------------------------------------


def _save_legacy(room: Lab, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: model.state_dict_for_save_checkpoint() for name, model in _models(room)}
    state["optimizer"] = room.optimizer.state_dict()
    torch.save(state, folder / f"rank-{dist.get_rank()}.pt")
    if room.recipe.optimizer == "distributed":
        room.optimizer.save_parameter_state(str(folder / f"optimizer-{dist.get_rank()}.pt"))
    if hasattr(room.optimizer, "save_state_dict_to_file"):  # layer-wise
        room.optimizer.save_state_dict_to_file(str(folder / f"layer-wise-{dist.get_rank()}.pt"))
    dist.barrier()


def _load_legacy(room: Lab, folder: Path) -> None:
    state = torch.load(folder / f"rank-{dist.get_rank()}.pt", weights_only=True)
    for name, model in _models(room):
        model.load_state_dict(state[name])
    if hasattr(room.optimizer, "load_state_dict_from_file"):
        room.optimizer.load_state_dict_from_file(str(folder / f"layer-wise-{dist.get_rank()}.pt"))
        return
    room.optimizer.load_state_dict(state["optimizer"])
    if room.recipe.optimizer == "distributed":
        room.optimizer.load_parameter_state(str(folder / f"optimizer-{dist.get_rank()}.pt"))


def _step_kept_in_groups(room: Lab) -> AbstractContextManager[None]:
    """Tell the distributed optimizer's checkpoint code that its Adam is one that keeps `step` in the group.

    That code asks whether TransformerEngine could be imported, not which Adam there is.
    """
    module = import_module(_DISTRIBUTED)
    flags = ("HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER") if room.recipe.fused_adam else ()
    return compat.replaced([(module, flag, True) for flag in flags if hasattr(module, flag)])


# Looking at it --------------------------------------------------------------------------------------------------------


def optimizers(room: Lab) -> list[Any]:
    """The optimizers that have parameters, out of whatever chain holds them."""
    chain = getattr(room.optimizer, "chained_optimizers", None) or [room.optimizer]
    return [one for one in chain if not getattr(one, "is_stub_optimizer", False)]


def parameters(room: Lab) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers of this rank, by name. Every rank calls it."""
    gather(room)
    return {name: _copy(tensor) for name, tensor in _named(room)}


def _named(room: Lab) -> Iterator[tuple[str, torch.Tensor]]:
    for key, model in _models(room):
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            yield (name if key == "model" else f"{key}.{name}"), tensor


def snapshot(room: Lab) -> dict[str, torch.Tensor]:
    """Copies of the whole state of this rank's training, by name. Every rank calls it.

    "NAME" is a parameter or buffer of the model (float or integer, as it is); "NAME.main", "NAME.exp_avg" and so on
    what an optimizer holds for it; "NAME.range" which slice of it these are, [start, end), where the optimizer is
    distributed. Megatron's own look-ups are not used, since a test may be about them.
    """
    found = parameters(room)
    names = {tensor: name for name, tensor in _named(room)}
    for optimizer in optimizers(room):
        for parameter, main in _main_copies(optimizer):
            name = names[parameter]
            found[f"{name}.main"] = _copy(main)
            if hasattr(optimizer, "model_param_gbuf_map"):
                part = optimizer._get_model_param_range_map(parameter)["param"]
                found[f"{name}.range"] = torch.tensor([part.start, part.end])
            # get(): [] would create an empty state, and Megatron asks whether there is any.
            for key, value in optimizer.optimizer.state.get(main, {}).items():
                # FusedAdam gives an fp32 parameter a main copy too, and never looks at it again.
                dead = key == "master_param" and main.dtype == torch.float32
                if isinstance(value, torch.Tensor) and not (dead and hasattr(optimizer.optimizer, "set_scaled_state")):
                    # TransformerEngine's fp8 tensors as the numbers they stand for.
                    plain = value.dequantize() if hasattr(value, "_fp8_dtype") else value
                    found[f"{name}.{key}"] = _copy(plain)
        for index, group in enumerate(optimizer.optimizer.param_groups):
            # torch's AdamW on the host counts steps for each parameter; nobody reads the group's count.
            if "step" in group and getattr(optimizer.optimizer, "gpu_optimizer", group) is not None:
                found[f"group {index} step"] = torch.tensor(int(group["step"]))
    return found


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy; of what FSDP2 has sharded, of the whole tensor."""
    whole = getattr(tensor, "full_tensor", None)
    return tensor.detach().clone() if whole is None else whole().detach().clone()


def _main_copies(optimizer: Any) -> Iterator[tuple[Any, Any]]:
    """(model parameter, what the inner optimizer updates for it); the same object where there is no copy."""
    if hasattr(optimizer, "shard_fp32_from_float16_groups"):
        # A precision-aware optimizer's FusedAdam is given the parameters, and keeps main copies beside its moments.
        given = zip(optimizer.shard_fp32_from_float16_groups, optimizer.shard_float16_groups, strict=True)
        mains = [[m if m is not None else s for m, s in zip(*groups, strict=True)] for groups in given]
        pairs = [
            (optimizer.model_float16_groups, mains),
            (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
        ]
    else:
        pairs = [
            (optimizer.float16_groups, optimizer.fp32_from_float16_groups),
            (optimizer.fp32_from_fp32_groups, optimizer.fp32_from_fp32_groups),
        ]
    for parameters, mains in pairs:
        for group, main_group in zip(parameters, mains, strict=True):
            yield from zip(group, main_group, strict=True)


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """The names under which two snapshots differ, bit for bit; a tensor that one of them lacks differs."""
    return sorted(
        name
        for name in one.keys() | other.keys()
        if name not in one
        or name not in other
        or one[name].dtype != other[name].dtype
        or not torch.equal(one[name], other[name])
    )
