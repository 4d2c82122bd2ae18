"""The layer-wise distributed optimizer (0.16 and later) around the laboratory's model, with an Adam inside."""

from __future__ import annotations

import inspect
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

import torch

from megatron_fp32_router.lab import compat, train
from megatron_fp32_router.lab.groups import chunks_in_training, seed

if TYPE_CHECKING:
    from megatron_fp32_router.lab.recipe import Recipe

_HOME: Final = "megatron.core.optimizer.layer_wise_optimizer"
_GROUP: Final = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False, "step": 0}


def modes() -> list[str]:
    """How parameters can be gathered in this Megatron, as `build` takes them; none where it has no such optimizer."""
    if find_spec(_HOME) is None:
        return []
    optimizer = import_module(_HOME).LayerWiseDistributedOptimizer
    layout = hasattr(optimizer, "compute_full_param_layout")
    overlap = layout or "async_allgather" in inspect.signature(optimizer.__init__).parameters
    return ["gather", *(["overlap"] if overlap else []), *(["layout"] if layout else [])]


def build(recipe: Recipe, mode: str) -> train.Lab:
    """A training. `mode`: "plain", every rank updates everything; "gather" after the step; "overlap", bucket by bucket
    before the next forward; "layout", where parameters lie in their gradient buffers' order.
    """
    seed(recipe.seed)
    (model,) = train.build_model(recipe)
    config = model.config
    model = import_module("megatron.core.transformer.module").Float16Module(config, model)
    distributed, optimizers = import_module("megatron.core.distributed"), import_module("megatron.core.optimizer")
    groups = import_module("megatron.core.process_groups_config").ProcessGroupCollection.use_mpu_process_groups()
    overlap = {"overlap_grad_reduce": mode == "overlap", "overlap_param_gather": mode == "overlap"}
    ddp = distributed.DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=mode == "layout", **overlap
    )
    home = import_module(_HOME).LayerWiseDistributedOptimizer
    extra: dict[str, Any] = {}
    if mode == "layout":
        for parameter in model.parameters():
            parameter.is_managed_by_layer_wise_optimizer = True
        sizes = [recipe.data_parallel, ddp, recipe.data_parallel]
        layout = home.compute_full_param_layout(list(model.parameters()), ddp.bucket_size, *sizes)
        extra["full_param_layout"] = layout
    chunk = distributed.DistributedDataParallel(config, ddp, model, **extra)
    chunks_in_training.add(chunk)
    adam = compat.FusedAdamLike([{"params": list(chunk.parameters()), **_GROUP}])
    settings = optimizers.OptimizerConfig(
        optimizer="adam", bf16=True, lr=1e-3, clip_grad=0.0, overlap_param_gather=mode == "overlap"
    )
    if mode == "plain":
        optimizer = optimizers.optimizer.Float16OptimizerWithFloat16Params(adam, settings, None, _start)
    else:
        wanted = compat.signature_kwargs(home.__init__, model_chunks=[chunk], async_allgather=mode == "overlap")
        optimizer = home([adam], settings, groups, init_state_fn_list=[_start], **wanted)
    room = train.Lab(recipe, config, [chunk], optimizer)
    train._connect(room)
    return room


def parameters(room: train.Lab) -> dict[str, torch.Tensor]:
    """Copies of all parameters, after every rank has gathered what other ranks updated."""
    if room.chunks[0].ddp_config.overlap_param_gather:
        room.chunks[0].disable_forward_pre_hook()
        room.chunks[0].enable_forward_pre_hook()
    return {name: parameter.detach().clone() for name, parameter in room.chunks[0].named_parameters()}


def _start(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Adam's state, as Megatron makes it before it loads one."""
    for parameter in [parameter for group in optimizer.param_groups for parameter in group["params"]]:
        if not optimizer.state[parameter]:
            optimizer.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
            optimizer.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
