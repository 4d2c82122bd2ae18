"""Train a few steps and print what came out, bit for bit: patched_train.py TREE MODE

MODE "patched": TREE has the source patches and the plugin is off. MODE "plugin": TREE is as released; first with the
plugin, then without it. Prints JSON: recipe -> digest of everything that was trained, and the same "off" in the
second mode, which must differ or the comparison would show nothing.
"""

from __future__ import annotations

import hashlib
import json
import sys
from importlib import import_module
from typing import Any

import torch

import megatron_fp32_router
from megatron_fp32_router import lab

SMALL = {"seq_length": 64, "hidden": 32, "moe_ffn": 32, "bias_start": 0.75}


def recipes(minor: int) -> dict[str, lab.Recipe]:
    """What is trained on release 0.`minor`."""
    second: dict[str, Any] = {"precision": "fp16", "score_function": "softmax", "expert_bias": False}
    # 0.15 has a router bias, but never initialises it: no two runs are alike there.
    second |= {"load_balancing": "global_aux_loss" if minor >= 15 else "aux_loss", "linear_bias": minor >= 16}
    return {
        "bf16, sigmoid, expert_bias, distributed optimizer": lab.Recipe(
            optimizer="distributed", overlap=False, fused_adam=True, **SMALL
        ),
        "fp16, softmax, auxiliary loss, plain optimizer": lab.Recipe(fused_adam=True, **{**SMALL, **second}),
    }


def digest(room: Any, losses: list[float]) -> str:
    """sha256 of the losses, the model and the optimizer's fp32 copies."""
    total = hashlib.sha256(json.dumps(losses).encode())
    tensors = {f"{i}.{name}": t for i, chunk in enumerate(room.chunks) for name, t in chunk.module.named_parameters()}
    for name, router in room.routers():
        for kind in ("expert_bias", "global_tokens_per_expert", "ga_steps"):
            if getattr(router, kind, None) is not None:
                tensors[f"{name}.{kind}"] = getattr(router, kind)
    for number, main in enumerate(main_parameters(room)):
        tensors[f"main {number:04d}"] = main
    for name in sorted(tensors):
        total.update(name.encode() + str(tensors[name].dtype).encode())
        total.update(tensors[name].detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def inner_optimizers(room: Any) -> list[Any]:
    """Megatron's optimizers below the chain that holds them."""
    return list(getattr(room.optimizer, "chained_optimizers", [room.optimizer]))


def main_parameters(room: Any) -> list[torch.Tensor]:
    """Every tensor that an inner optimizer steps."""
    return [p for o in inner_optimizers(room) for group in o.optimizer.param_groups for p in group["params"]]


def check_distributed_numbering(room: Any) -> None:
    """Where the map says that a parameter lies in its group, a shard of that parameter lies."""
    for optimizer in inner_optimizers(room):
        for parameter, (group, order) in optimizer.model_param_group_index_map.items():
            shard = optimizer.optimizer.param_groups[group]["params"][order]
            assert shard.numel() == parameter.numel()  # one rank: it owns all of every parameter
            assert torch.equal(shard.to(parameter.dtype).flatten(), parameter.detach().flatten())
            assert shard.is_leaf


def check_plain_checkpoint(room: Any) -> None:
    """Every state in a distributed checkpoint is saved under the name of the parameter that it belongs to."""
    model_state = room.chunks[0].module.sharded_state_dict()
    for optimizer in inner_optimizers(room):
        if not any(group["params"] for group in optimizer.optimizer.param_groups):
            continue
        by_main = {
            id(main): model
            for models, mains in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True)
            for model, main in zip(models, mains, strict=True)
        }
        parameters = [p for group in optimizer.optimizer.param_groups for p in group["params"]]
        names = {id(t.data): t.key for t in sharded_tensors(model_state)}
        saved = optimizer.sharded_state_dict(model_state)["optimizer"]["state"]
        for number, parameter in enumerate(parameters):
            model = by_main.get(id(parameter), parameter)
            entry = saved[number]["exp_avg"]
            assert entry.data is optimizer.optimizer.state[parameter]["exp_avg"]
            assert entry.key.endswith(names[id(model)]), (entry.key, names[id(model)])


def sharded_tensors(tree: Any) -> list[Any]:
    """The ShardedTensors in a nested state dict."""
    mapping = import_module("megatron.core.dist_checkpointing.mapping")
    if isinstance(tree, dict):
        return [found for value in tree.values() for found in sharded_tensors(value)]
    if isinstance(tree, (list, tuple)):
        return [found for value in tree for found in sharded_tensors(value)]
    return [tree] if isinstance(tree, mapping.ShardedTensor) else []


def train(recipe: lab.Recipe, check: bool) -> str:
    """Three steps."""
    with lab.parallel(recipe):
        room = lab.build(recipe)
        batches = lab.text_batches(recipe, seed=3)
        losses = [room.step(batches) for _ in range(3)]
        assert room.stepped
        if check and recipe.optimizer == "distributed":
            check_distributed_numbering(room)
        elif check:
            check_plain_checkpoint(room)
        return digest(room, losses)


def main(tree: str, mode: str) -> None:
    """Train every recipe and print the digests."""
    megatron_fp32_router.disable()
    lab.prepare(tree)
    minor = int(lab.megatron_version().split(".")[1])
    result: dict[str, str] = {}
    if mode == "plugin":
        megatron_fp32_router.enable()
    for name, recipe in recipes(minor).items():
        result[name] = train(recipe, check=mode == "patched")
    if mode == "plugin":
        megatron_fp32_router.disable()
        for name, recipe in recipes(minor).items():
            result[f"off: {name}"] = train(recipe, check=False)
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
