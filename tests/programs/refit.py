"""What the two ranks of tests/megatron/test_refit.py run: rank 0 trains, rank 1 rolls out, and weights go over."""

from __future__ import annotations

import types
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

import megatron_fp32_router
from megatron_fp32_router import lab


def turn(setting: str) -> None:
    """ "all" or "buffers": the plugin with that PROTECT; "off": without it."""
    megatron_fp32_router.disable()
    if setting != "off":
        megatron_fp32_router.enable(protect=setting)


def model(recipe: Any, seed: int, groups: Any) -> Any:
    """A model in bf16, as a training or a rollout holds it, with parallel groups of its own."""
    lab.seed(seed)
    (built,) = lab.build_model(recipe)
    built = import_module("megatron.core.transformer.module").Float16Module(built.config, built).module
    built.pg_collection = groups
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter, dtype=torch.float32) * 1e-2)
    for name, buffer in built.named_buffers():
        if name.endswith("expert_bias"):
            buffer.copy_(torch.randn(buffer.shape) * 0.3)
    return built


def nothing(like: Any) -> Any:
    """0.16 wants a model on both sides of every rank."""
    module = torch.nn.Module()
    module.config, module.pg_collection = like.config, like.pg_collection
    return module


def hand_over(recipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Every case "SENDER RECEIVER" twice, from one plan: what each rank's model held before and holds afterwards."""
    rank = dist.get_rank()
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    names = ("tp", "pp", "ep", "dp", "expt_tp", "expt_dp", "tp_ep", "cp", "dp_cp", "tp_cp")
    refit = import_module("megatron.core.resharding.refit")
    found: dict[str, Any] = {}
    for case in arguments["cases"]:
        # Caches are by layout, or on the model; here another model has the same one.
        getattr(refit, "clear_all_caches", refit.clear_service_cache)()
        turn(case.split()[rank])
        mine = model(recipe, rank, types.SimpleNamespace(**dict.fromkeys(names, alone)))
        other = nothing(mine) if arguments["both"] else None
        found[case] = [state(mine)]
        for _ in range(2):
            if rank == 0:
                with torch.no_grad():
                    for parameter in mine.parameters():
                        parameter.mul_(1.01)
            refit.swap_model_weights(*((mine, other) if rank == 0 else (other, mine)), "gloo")
            found[case].append(state(mine))
    return found


def state(module: Any) -> dict[str, torch.Tensor]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
