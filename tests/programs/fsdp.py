"""What the two ranks of tests/megatron/test_fsdp.py run, all of it in the layout that their launch made.

torch remembers the meshes of DTensors that it has seen, and takes the groups of one layout for those of the next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp as fsdp
from programs import resume

from megatron_fp32_router import lab
from megatron_fp32_router.lab import checkpoint, cpu_fsdp
from megatron_fp32_router.lab.recipe import Recipe

ONE: dict[str, Any] = {**resume.TINY, "data_parallel": 2, "layers": 1, "overlap": False, "fused_adam": True}
FSDP2: dict[str, Any] = {**ONE, "wrapper": "fsdp2"}
MEGATRON: dict[str, Any] = {**ONE, "wrapper": "megatron_fsdp", "optimizer": "distributed"}


def write(recipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """All that needs no second process, and the first half of the resumes."""
    folder = Path(arguments["folder"])
    resume.turn("on")
    found: dict[str, Any] = {"unrepaired": unrepaired()}
    alike = {"micro_batches": 1, "clip_grad": 0.0}
    found["ddp"], found["fsdp2"] = (one_step(Recipe(**{**kind, **alike})) for kind in (ONE, FSDP2))
    found["steps"] = steps(Recipe(**{**FSDP2, "clip_grad": 0.5}))
    if arguments["megatron_fsdp"]:
        with cpu_fsdp.megatron_fsdp():
            found["megatron_fsdp"] = megatron_steps(Recipe(**{**MEGATRON, **alike}))
            found["low"] = low_main_copies(Recipe(**{**MEGATRON, **alike}))
    apart = {dtype: resume.build(Recipe(**{**FSDP2, "precision": dtype})) for dtype in ("bf16", "fp32")}
    found["apart"] = {d: [isinstance(r, fsdp.FSDPModule) for _, r in room.routers()] for d, room in apart.items()}
    found["torch_dist"] = {plugin: save_torch_dist(plugin, folder / plugin) for plugin in ("off", "on")}
    for case in arguments["cases"]:
        resume.turn(case["plugin"])
        found[case["name"]] = resume.write_here(case, folder)
    return found


def read(recipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The second half."""
    found = {}
    for case in arguments["cases"]:
        resume.turn(case["then"])
        found[case["name"]] = resume.read_here(case, Path(arguments["folder"]))
    return found


@contextlib.contextmanager
def without(module: str, name: str, method: str) -> Iterator[None]:
    """Put the function that a patch replaces back, while this is open."""
    kind = getattr(import_module(module), name)
    ours = getattr(kind, method)
    setattr(kind, method, ours.__wrapped__)
    try:
        yield
    finally:
        setattr(kind, method, ours)


def unrepaired() -> list[str]:
    """How a step fails without one patch or the other."""
    home = "megatron.core.distributed.torch_fully_sharded_data_parallel"
    with without(home, "TorchFullyShardedDataParallel", "__init__"):
        units = resume.attempt(lambda: one_step(Recipe(**FSDP2)))
    optimizer = "megatron.core.optimizer.optimizer"
    with without(optimizer, "Float16OptimizerWithFloat16Params", "_copy_model_grads_to_main_grads"):
        gradients = resume.attempt(lambda: one_step(Recipe(**FSDP2)))
    return [units, gradients]


def one_step(recipe: Any) -> dict[str, torch.Tensor]:
    room = resume.build(recipe)
    room.step(lab.text_batches(recipe, seed=7))
    return checkpoint.snapshot(room)


def steps(recipe: Any) -> dict[str, Any]:
    """Three steps of two micro-batches: what the inner optimizer was given of every router, and what came of it."""
    room = resume.build(recipe)
    (optimizer,) = checkpoint.optimizers(room)
    weights = {name: router.weight for name, router in room.routers()}
    real = optimizer.optimizer.step
    found: dict[str, Any] = {
        "start": {name: weight.full_tensor().detach() for name, weight in weights.items()},
        "gradients": [],
        "norms": [],
        "clipped": [],
    }

    def step(*args: Any, **kwargs: Any) -> Any:
        given = [p.grad.full_tensor() for group in optimizer.optimizer.param_groups for p in group["params"]]
        found["clipped"].append(float(sum(one.double().square().sum() for one in given) ** 0.5))
        found["gradients"].append({name: weight.grad.full_tensor() for name, weight in weights.items()})
        return real(*args, **kwargs)

    optimizer.optimizer.step = step
    batches = lab.text_batches(recipe, seed=7)
    for _ in range(3):
        room.step(batches)
        found["norms"].append(room.grad_norm)
    found["end"] = {name: weight.full_tensor().detach() for name, weight in weights.items()}
    return found


def megatron_steps(recipe: Any) -> dict[str, Any]:
    """Three steps with Megatron-FSDP: what the inner optimizer was given of every router, and what came of each."""
    room = resume.build(recipe)
    (optimizer,) = checkpoint.optimizers(room)
    real = optimizer.optimizer.step
    found: dict[str, Any] = {"weights": [], "gradients": [], "biases": []}

    routers = {f"module.{name.replace('module.', '')}": router for name, router in room.routers()}

    def look() -> dict[str, torch.Tensor]:
        return {name: together(router.weight) for name, router in routers.items()}

    def step(*args: Any, **kwargs: Any) -> Any:
        found["weights"].append(look())
        found["gradients"].append({name: together(router.weight.grad) for name, router in routers.items()})
        return real(*args, **kwargs)

    optimizer.optimizer.step = step
    batches = lab.text_batches(recipe, seed=7)
    for _ in range(3):
        room.step(batches)
        found["biases"].append({name: router.expert_bias.clone() for name, router in routers.items()})
    room.chunks[0].module.synchronize_param_gather()  # it shows the main copies again
    found["weights"].append(look())
    return found


def together(tensor: Any) -> torch.Tensor:
    """All rows of what the ranks share unevenly, as DTensor.full_tensor does not expect; None: this rank has none."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, None if tensor is None else tensor.detach().to_local())
    return torch.cat([part for part in parts if part is not None])


def low_main_copies(recipe: Any) -> dict[str, Any]:
    """Router weights after a step with main copies in bf16 and without the refusal, and what the refusal says."""
    low = replace(recipe, ddp_extra={"megatron_fsdp_main_params_dtype": torch.bfloat16})
    with without("megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp", "MegatronFSDP", "__init__"):
        room = resume.build(low)
        room.step(lab.text_batches(recipe, seed=7))
    return {
        "weights": [router.weight.detach().clone() for _, router in room.routers()],
        "stopped": resume.attempt(lambda: resume.build(low)),
    }


def save_torch_dist(plugin: str, folder: Path) -> str:
    resume.turn(plugin)
    recipe = Recipe(**FSDP2)
    room = resume.build(recipe)
    room.step(lab.text_batches(recipe, seed=7))
    # All ranks fail before the first of them writes.
    return resume.attempt(lambda: checkpoint.save(room, folder, "torch_dist"))
