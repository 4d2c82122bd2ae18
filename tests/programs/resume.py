"""What the ranks of tests/megatron/test_resume*.py run: train and save in one process, load and go on in another.

A case is {"name", "fields" of its Recipe, "formats", "plugin": before the save, "then": after the load}, and maybe
"engine": (TransformerEngine's folder, the version that Megatron is told). All cases of a launch share its ranks, one
layout after another.
"""

from __future__ import annotations

import contextlib
import dataclasses
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

import megatron_fp32_router
from megatron_fp32_router import lab
from megatron_fp32_router.lab import checkpoint, cpu, transformer_engine

#: Small enough that building, three steps and a checkpoint take a fraction of a second.
TINY: dict[str, Any] = {"hidden": 32, "moe_ffn": 32, "experts": 4, "seq_length": 32, "vocab": 64, "bias_start": 0.75}
STEPS = 3


def recipe_of(case: dict[str, Any]) -> Any:
    return lab.Recipe(**{**TINY, **case["fields"]})


def engine(case: dict[str, Any]) -> Any:
    """The context in which Megatron finds TransformerEngine's FusedAdam, or a host to offload to, as the case says."""
    stack = contextlib.ExitStack()
    tree, version = case.get("engine") or ("", "")
    if tree:
        stack.enter_context(transformer_engine.in_use(Path(tree), version))
    if case["fields"].get("optimizer_extra", {}).get("optimizer_cpu_offload"):
        stack.enter_context(cpu.offloading())
    return stack


def build(recipe: Any) -> Any:
    """A model and an optimizer, the same ones every time."""
    lab.seed(recipe.seed)
    return lab.wrap(recipe, lab.build_model(recipe))


def turn(plugin: str) -> None:
    """ "on", "off", or "buffers": on, with weight and bias left to Megatron."""
    megatron_fp32_router.disable()
    if plugin != "off":
        megatron_fp32_router.enable(protect="buffers" if plugin == "buffers" else "all")


def train(room: Any, first: int) -> list[float]:
    """STEPS steps, of which `first` have been taken before; returns their losses."""
    batches = lab.text_batches(room.recipe, seed=7)
    for _ in range(first * room.recipe.micro_batches):
        next(batches)
    return [room.step(batches) for _ in range(STEPS)]


def attempt(action: Any) -> str:
    """Why `action` failed, or an empty string. A failure that not all ranks share would be a hang, and is not tried."""
    try:
        action()
    except BaseException as error:  # torch's CheckpointException is no Exception
        return f"{type(error).__name__}: {error}"
    return ""


def write(recipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Train six steps; and again with a checkpoint in every format after three. Both must end alike."""
    lab.leave_layout()
    return {case["name"]: write_one(case, Path(arguments["folder"])) for case in arguments["cases"]}


def write_one(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    turn(case["plugin"])
    with lab.layout(recipe_of(case)), engine(case):
        return write_here(case, folder)


def write_here(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """In the layout that is there, with the plugin as it is."""
    recipe, home = recipe_of(case), folder / case["name"]
    home.mkdir(exist_ok=True)
    straight = build(recipe)
    losses = train(straight, 0) + train(straight, STEPS)
    end = checkpoint.snapshot(straight)
    room = build(recipe)
    train(room, 0)
    middle = checkpoint.snapshot(room)
    failures = {name: attempt(lambda name=name: checkpoint.save(room, home / name, name)) for name in case["formats"]}
    train(room, STEPS)
    disturbed = checkpoint.differences(end, checkpoint.snapshot(room))
    keep(room, home, middle, end=end, losses=losses)
    return {"failures": failures, "disturbed": disturbed, "losses": losses}


def keep(room: Any, home: Path, middle: dict[str, torch.Tensor], **more: Any) -> None:
    """Write down what this rank held when it saved, and which part of the whole that was."""
    place = {"cuts": cuts(room), "tensor_rank": tensor_place()[0]}
    torch.save({"middle": middle, **place, **more}, home / f"truth-{dist.get_rank()}.pt")


def tensor_place() -> tuple[int, int]:
    """This rank's number among the tensor-parallel ranks, and how many they are."""
    state = import_module("megatron.core.parallel_state")
    return state.get_tensor_model_parallel_rank(), state.get_tensor_model_parallel_world_size()


def cuts(room: Any) -> dict[str, int]:
    """Parameter -> the dimension along which tensor-parallel ranks share it; those that each has whole are left out."""
    return {
        name: parameter.partition_dim
        for chunk in room.chunks
        for name, parameter in chunk.module.named_parameters()
        if getattr(parameter, "tensor_model_parallel", False)
    }


def read(recipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Load every checkpoint that was written, and train three steps more; load some of them into other layouts."""
    lab.leave_layout()
    home = Path(arguments["folder"])
    found = {f"{case['name']} {case['then']}": read_one(case, home) for case in arguments["cases"]}
    return {**found, "resharded": [reshard(case, home) for case in arguments["resharded"]]}


def reshard(case: dict[str, Any], folder: Path) -> dict[str, list[str]]:
    """Load what another layout has saved: format -> which parts of the state are not what that layout held."""
    recipe, home = recipe_of(case), folder / case["name"]
    turn(case["then"])
    found = {}
    with lab.layout(recipe):
        for name in case["formats"]:
            room = build(recipe)
            checkpoint.load(room, home / name, name)
            found[name] = differences_from_whole(room, home)
    return found


def read_one(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    turn(case["then"])
    with lab.layout(recipe_of(case)), engine(case):
        return read_here(case, folder)


def read_here(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """For each format: {"failure", "loaded": what differs after the load, "end": what differs three steps later}."""
    recipe, home = recipe_of(case), folder / case["name"]
    results: dict[str, Any] = {}
    truth = torch.load(home / f"truth-{dist.get_rank()}.pt", weights_only=True)
    if case["then"] != case["plugin"]:
        truth = transplanted(recipe, home)
    for name in case["formats"]:
        room = build(recipe)
        before = checkpoint.snapshot(room)
        failure = attempt(lambda room=room, name=name: checkpoint.load(room, home / name, name))
        if failure:
            overwritten = [n for n in checkpoint.differences(before, checkpoint.snapshot(room)) if n in before]
            results[name] = {"failure": failure, "overwritten": overwritten}
            continue
        loaded = checkpoint.differences(truth["middle"], checkpoint.snapshot(room))
        losses = train(room, STEPS)
        results[name] = {
            "failure": "",
            "loaded": loaded,
            "end": checkpoint.differences(truth["end"], checkpoint.snapshot(room)),
            "losses": losses == truth["losses"][-STEPS:],
        }
    return results


def refuse(recipe: Any, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Save without the plugin, load with it and with buckets of another size: what it says, and what it has touched."""
    lab.leave_layout()
    return [refuse_one(case, Path(arguments["folder"]) / case["name"]) for case in arguments["cases"]]


def refuse_one(case: dict[str, Any], home: Path) -> dict[str, Any]:
    name, recipe = case["format"], recipe_of(case)
    with lab.layout(recipe):
        turn("off")
        # A bucket for each parameter, so that padding is at other places than in one bucket for all.
        saved = build(dataclasses.replace(recipe, ddp_extra={"bucket_size": 1}))
        train(saved, 0)
        checkpoint.save(saved, home, name)
        turn("on")
        room = build(recipe)
        before, files = checkpoint.snapshot(room), content(home)
        failure = attempt(lambda: checkpoint.load(room, home, name))
        changed = [n for n in checkpoint.differences(before, checkpoint.snapshot(room)) if n in before]
    return {"failure": failure, "changed": changed, "untouched": content(home) == files}


def content(folder: Path) -> dict[str, bytes]:
    """Every file in it and its bytes."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# The other setting's state, put in place by hand: what a resume across on and off has to equal ------------------------


def whole(home: Path) -> dict[str, torch.Tensor]:
    """The state of all ranks at the save in one dictionary by name: a distributed optimizer's slices and the parts of
    tensor-parallel ranks joined. Everything that belongs to a parameter has its shape."""
    by_tensor_rank: dict[int, dict[str, torch.Tensor]] = {}
    cut: dict[str, int] = {}
    for path in sorted(home.glob("truth-*.pt")):
        kept = torch.load(path, weights_only=True)
        state, cut = kept["middle"], kept["cuts"]
        found = by_tensor_rank.setdefault(kept["tensor_rank"], {})
        for name, value in state.items():
            base, _, kind = name.rpartition(".")
            if kind == "range":
                continue
            if base not in state or value.dim() == 0:  # of the model itself, or one number for all ranks
                found.setdefault(name, value)
                continue
            start, end = state.get(f"{base}.range", torch.tensor([0, value.numel()])).tolist()
            joined = found.setdefault(name, torch.full(state[base].shape, float("nan"), dtype=value.dtype))
            joined.view(-1)[start:end] = value.view(-1)
    parts = [by_tensor_rank[rank] for rank in sorted(by_tensor_rank)]
    return {
        name: torch.cat([part[name] for part in parts], dim) if (dim := cut_of(name, value, cut)) is not None else value
        for name, value in parts[0].items()
    }


def of_this_rank(recipe: Any, home: Path) -> dict[str, torch.Tensor]:
    """The state of everything that this rank has, or has a slice of; it sits where it sat when it was saved."""
    own: dict[str, torch.Tensor] = torch.load(home / f"truth-{dist.get_rank()}.pt", weights_only=True)["middle"]
    if recipe.data_parallel == 1:
        return own
    alone = ".local_experts." if recipe.expert_parallel > 1 else "no name"
    return {**whole(home), **{name: value for name, value in own.items() if alone in name}}


def cut_of(name: str, value: torch.Tensor, cut: dict[str, int]) -> int | None:
    """The dimension along which `name`, a parameter or what belongs to one, is shared out, if it is."""
    return None if value.dim() == 0 else cut.get(name, cut.get(name.rpartition(".")[0]))


def transplanted(recipe: Any, home: Path) -> dict[str, Any]:
    """Build under this process's setting, write the saved state in by name, and train on: no checkpoint involved.

    Parameters take the value of their main copy, rounded where this setting keeps them in bf16.
    """
    state = of_this_rank(recipe, home)
    room = build(recipe)
    names: dict[Any, str] = {}
    with torch.no_grad():
        for key, model in checkpoint._models(room):
            prefix = "" if key == "model" else f"{key}."
            for name, parameter in model.named_parameters(prefix=prefix.removesuffix(".")):
                names[parameter] = name
                put(parameter, state[f"{name}.main"])
            for name, buffer in model.named_buffers(prefix=prefix.removesuffix(".")):
                buffer.copy_(state[name])
        for optimizer in checkpoint.optimizers(room):
            for parameter, main in checkpoint._main_copies(optimizer):
                name, part = names[parameter], slice(None)
                if hasattr(optimizer, "model_param_gbuf_map"):
                    found = optimizer._get_model_param_range_map(parameter)["param"]
                    part = slice(found.start, found.end)
                put(main, state[f"{name}.main"], part)
                inner = optimizer.optimizer.state[main]
                for kind in ("exp_avg", "exp_avg_sq", "momentum_buffer", "step"):
                    if f"{name}.{kind}" in state:
                        value = state[f"{name}.{kind}"]
                        inner[kind] = value.clone() if value.dim() == 0 else put(torch.empty_like(main), value, part)
            for index, group in enumerate(optimizer.optimizer.param_groups):
                if f"group {index} step" in state:
                    group["step"] = int(state[f"group {index} step"])
    middle = checkpoint.snapshot(room)
    losses = train(room, STEPS)
    return {"middle": middle, "end": checkpoint.snapshot(room), "losses": losses}


def put(target: torch.Tensor, value: torch.Tensor, part: slice = slice(None)) -> torch.Tensor:
    """Write `part` of `value` into `target`; into its shard, where FSDP2 has sharded it."""
    if isinstance(target, DTensor):
        target.copy_(distribute_tensor(value.view(target.shape), target.device_mesh, target.placements))
    else:
        target.copy_(value.view(-1)[part].view_as(target))
    return target


def differences_from_whole(room: Any, home: Path) -> list[str]:
    """What this rank holds and what the ranks before the save held together: names that differ, bit for bit.

    For layouts that slice otherwise. Counters are left out: each data-parallel rank has its own.
    """
    state, found, cut = whole(home), checkpoint.snapshot(room), cuts(room)
    rank, ranks = tensor_place()
    different, compared = [], set()
    for name, value in found.items():
        base, _, kind = name.rpartition(".")
        if kind == "range" or ".local_tokens" in name:
            continue
        # Saved in bf16, a router weight is what its main copy was.
        expected = state[name] if state[name].dtype == value.dtype else state[f"{name}.main"]
        if (dim := cut_of(name, expected, cut)) is not None:
            expected = expected.chunk(ranks, dim)[rank]
        if f"{base}.range" in found and value.dim() > 0:
            start, end = found[f"{base}.range"].tolist()
            expected = expected.reshape(-1)[start:end]
        compared.add(f"{base.rpartition('.')[2]}.{kind}")
        if not torch.equal(expected.reshape(value.shape), value):
            different.append(name)
    assert compared >= {"router.weight", "weight.main", "weight.exp_avg", "weight.exp_avg_sq"}, compared
    return different
