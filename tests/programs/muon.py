"""What the two ranks of tests/megatron/test_muon.py run."""

from __future__ import annotations

import typing
from collections import defaultdict
from importlib import import_module
from pathlib import Path
from typing import Any

# The package asks for Python 3.12, and only for this.
if not hasattr(typing, "override"):
    typing.override = lambda function: function  # type: ignore[attr-defined]

import torch
from programs import resume

from megatron_fp32_router import lab
from megatron_fp32_router.lab import checkpoint
from megatron_fp32_router.lab import train as lab_train


def build(recipe: Any, layer_wise: bool) -> Any:
    """A training with Megatron's Muon, as Megatron makes it."""
    home = import_module("megatron.core.optimizer")

    def optimizer(recipe: Any, config: Any, chunks: Any) -> Any:
        fields = {"lr": recipe.lr, "weight_decay": 0.0, "clip_grad": recipe.clip_grad, "bf16": True}
        wanted = {"optimizer": "muon", "use_layer_wise_distributed_optimizer": layer_wise}
        return home.get_megatron_optimizer(home.OptimizerConfig(**fields, **wanted), chunks)

    kept, lab_train._optimizer = lab_train._optimizer, optimizer
    try:
        return resume.build(recipe)
    finally:
        lab_train._optimizer = kept


def twin_of(inner: Any, weight: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """A second optimizer like `inner`, and a separate fp32 parameter in it that starts as `weight`."""
    parameter = torch.nn.Parameter(weight.detach().clone())
    other = type(inner).__new__(type(inner))
    vars(other).update(vars(inner))
    other.state = defaultdict(dict)
    other.param_groups = [{**inner.param_groups[0], "params": [parameter]}]
    return other, parameter


def train(recipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Three steps beside the twins, then a resume; what differs."""
    found: dict[str, Any] = {}
    for layer_wise in (False, True):
        room = build(recipe, layer_wise)
        inner = next(
            one.optimizer
            for one in room.optimizer.chained_optimizers
            if type(one.optimizer).__name__ == "TensorParallelMuon"
        )
        twins = {name: (router.weight, *twin_of(inner, router.weight)) for name, router in room.routers()}
        batches = lab.text_batches(recipe, seed=7)
        bits = []
        for _ in range(3):
            room.step_without_optimizer(batches)
            for weight, other, parameter in twins.values():
                parameter.grad = weight.main_grad.detach().clone()
                other.step()
            room.optimizer.step()
            bits += [torch.equal(weight, parameter) for weight, _, parameter in twins.values()]
        mine = [p for group in inner.param_groups for p in group["params"]]
        owned = [name for name, (weight, _, _) in twins.items() if any(weight is p for p in mine)]
        folder = Path(arguments["folder"]) / str(layer_wise)
        checkpoint.save(room, folder, "torch_dist")
        other_room = build(recipe, layer_wise)
        checkpoint.load(other_room, folder, "torch_dist")
        differences = checkpoint.differences(checkpoint.snapshot(room), checkpoint.snapshot(other_room))
        dtypes = {str(weight.dtype) for weight, _, _ in twins.values()}
        found[str(layer_wise)] = {"bits": bits, "owned": owned, "differences": differences, "dtypes": sorted(dtypes)}
    return found
