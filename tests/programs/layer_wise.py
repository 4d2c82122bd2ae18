"""What the two ranks of tests/megatron/test_layer_wise.py run."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from programs import resume

from megatron_fp32_router import lab
from megatron_fp32_router.lab import checkpoint, compat
from megatron_fp32_router.lab import train as lab_train

GROUP = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False, "step": 0}


def start(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Adam's state, as Megatron makes it before it loads one."""
    for parameter in [parameter for group in optimizer.param_groups for parameter in group["params"]]:
        if not optimizer.state[parameter]:
            optimizer.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
            optimizer.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)


def build(recipe: Any, mode: str) -> Any:
    """A training. `mode`: "plain", every rank updates everything; "gather" after the step; "overlap", bucket by bucket
    before the next forward; "layout", where parameters lie in their gradient buffers' order.
    """
    lab.seed(recipe.seed)
    (model,) = lab.build_model(recipe)
    config = model.config
    model = import_module("megatron.core.transformer.module").Float16Module(config, model)
    distributed, optimizers = import_module("megatron.core.distributed"), import_module("megatron.core.optimizer")
    groups = import_module("megatron.core.process_groups_config").ProcessGroupCollection.use_mpu_process_groups()
    overlap = {"overlap_grad_reduce": mode == "overlap", "overlap_param_gather": mode == "overlap"}
    ddp = distributed.DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=mode == "layout", **overlap
    )
    home = import_module("megatron.core.optimizer.layer_wise_optimizer").LayerWiseDistributedOptimizer
    extra: dict[str, Any] = {}
    if mode == "layout":
        for parameter in model.parameters():
            parameter.is_managed_by_layer_wise_optimizer = True
        sizes = [recipe.data_parallel, ddp, recipe.data_parallel]
        layout = home.compute_full_param_layout(list(model.parameters()), ddp.bucket_size, *sizes)
        extra["full_param_layout"] = layout
    chunk = distributed.DistributedDataParallel(config, ddp, model, **extra)
    lab_train.chunks_in_training.add(chunk)
    adam = compat.FusedAdamLike([{"params": list(chunk.parameters()), **GROUP}])
    settings = optimizers.OptimizerConfig(
        optimizer="adam", bf16=True, lr=1e-3, clip_grad=0.0, overlap_param_gather=mode == "overlap"
    )
    if mode == "plain":
        optimizer = optimizers.optimizer.Float16OptimizerWithFloat16Params(adam, settings, None, start)
    else:
        wanted = compat.signature_kwargs(home.__init__, model_chunks=[chunk], async_allgather=mode == "overlap")
        optimizer = home([adam], settings, groups, init_state_fn_list=[start], **wanted)
    room = lab_train.Lab(recipe, config, [chunk], optimizer)
    lab_train._connect(room)
    return room


def parameters(room: Any) -> dict[str, torch.Tensor]:
    """What all ranks train on from, once they have all of it."""
    if room.chunks[0].ddp_config.overlap_param_gather:
        room.chunks[0].disable_forward_pre_hook()
        room.chunks[0].enable_forward_pre_hook()
    return {name: parameter.detach().clone() for name, parameter in room.chunks[0].named_parameters()}


def train(recipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """For each mode: parameters after three steps, and which fp32 parameters this rank updated; then resumes."""
    found: dict[str, Any] = {}
    for mode in arguments["modes"]:
        room = build(recipe, mode)
        resume.train(room, 0)
        mains = [one for group in checkpoint.optimizers(room)[0].optimizer.param_groups for one in group["params"]]
        mine = [name for name, parameter in room.chunks[0].named_parameters() if any(parameter is one for one in mains)]
        found[mode] = {"parameters": parameters(room), "mine": mine}
    for name in arguments["resumes"]:
        before, mode = name.split()
        resume.turn(before)
        room = build(recipe, mode)
        resume.train(room, 0)
        parameters(room)
        checkpoint.save(room, Path(arguments["folder"]) / name, "torch_dist")
        saved = checkpoint.snapshot(room)
        resume.turn("on")
        other = build(recipe, mode)
        checkpoint.load(other, Path(arguments["folder"]) / name, "torch_dist")
        found[name] = {"saved": saved, "loaded": checkpoint.snapshot(other)}
    return found
