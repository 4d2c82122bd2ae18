"""Megatron's refit between two ranks: rank 0 trains and sends its weights to rank 1, which rolls out."""

from __future__ import annotations

import types
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from megatron_fp32_router.lab.groups import seed
from megatron_fp32_router.lab.recipe import Recipe
from megatron_fp32_router.lab.train import build_model

#: The names of the parallel groups that refit asks a model for.
_GROUPS = ("tp", "pp", "ep", "dp", "expt_tp", "expt_dp", "tp_ep", "cp", "dp_cp", "tp_cp")


def groups() -> Any:
    """Parallel groups of each of the two ranks alone. A collective."""
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    return types.SimpleNamespace(**dict.fromkeys(_GROUPS, alone))


def model(recipe: Recipe, number: int, groups: Any) -> Any:
    """A model in bf16 as a training or a rollout holds it. `number` seeds its weights and biases."""
    seed(number)
    (built,) = build_model(recipe)
    built = import_module("megatron.core.transformer.module").Float16Module(built.config, built).module
    built.pg_collection = groups
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter, dtype=torch.float32) * 1e-2)
    for name, buffer in built.named_buffers():
        if name.endswith("expert_bias"):
            buffer.copy_(torch.randn(buffer.shape) * 0.3)
    return built


def other_side(mine: Any) -> Any:
    """An empty model: up to 0.16 each rank needs one on both sides, and keeps its plan on the receiving one."""
    other = torch.nn.Module()
    other.config, other.pg_collection = mine.config, mine.pg_collection
    return other


def hand_over(mine: Any, other: Any) -> None:
    """Send rank 0's weights to rank 1's model. A collective. `other`: of `other_side`, the same for one plan."""
    pair = (mine, other) if dist.get_rank() == 0 else (other, mine)
    import_module("megatron.core.resharding.refit").swap_model_weights(*pair, "gloo")


def forget_plans() -> None:
    """Make the next refit plan again. Plans are kept by layout or on the model, and a new model may get an old one."""
    home = import_module("megatron.core.resharding.refit")
    getattr(home, "clear_all_caches", home.clear_service_cache)()


def state(module: Any) -> dict[str, torch.Tensor]:
    """A copy of every parameter and buffer."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
