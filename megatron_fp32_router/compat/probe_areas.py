"""What the probe does with two ranks: optimizers, their checkpoints, and pipeline schedules, by area.

Every promise goes through its own layout of the two ranks. What is compared is compared after the last collective, so
that a rank that finds something wrong leaves no other one waiting.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

from megatron_fp32_router import disable, enable
from megatron_fp32_router.compat.probe_proving import RESUMED, STEPS, Failed, LeftOut, Promise, prove_each, same
from megatron_fp32_router.compat.probe_run import update
from megatron_fp32_router.lab import (
    Lab,
    Recipe,
    build_model,
    checkpoint,
    compat,
    layer_wise,
    layout,
    leave_layout,
    refit,
    seed,
    text_batches,
    transformer_engine,
    wrap,
)

#: Two ranks of whatever kind. Small enough that building, three steps and a checkpoint take a fraction of a second.
RECIPE: Final = Recipe(
    data_parallel=2, hidden=32, moe_ffn=32, experts=4, seq_length=32, vocab=64, bias_start=0.75, clip_grad=0.0
)
#: What is tried here, of patching.record.AREAS.
AREAS: Final = frozenset(
    {"data_parallel", "optimizer", "distributed", "torch_dist", "layer_wise", "schedules", "refit"}
)
_PLAIN: Final[dict[str, Any]] = {"fused_adam": True}
_DISTRIBUTED: Final[dict[str, Any]] = {"optimizer": "distributed", "fused_adam": True}


def prove(recipe: Recipe, arguments: dict[str, Any]) -> dict[str, Any]:
    """Try the promises of `arguments["areas"]`, as probe_run.py does its own."""
    leave_layout()
    return prove_each(_promises(arguments), recipe, arguments, stop=True)


def _promises(arguments: dict[str, Any]) -> dict[str, Promise]:
    areas, engine = set(arguments["areas"]), arguments["transformer_engine"]
    found: dict[str, Promise] = {}
    if "data_parallel" in areas:
        found["data_parallel: buckets"] = _buckets
    if "optimizer" in areas:
        found["optimizer: updates"] = _updates
        found["optimizer: torch"] = partial(_resume, fields=_PLAIN, name="torch", from_off=True)
    if areas & {"optimizer", "torch_dist"}:
        found["optimizer: torch_dist"] = partial(_resume, fields=_PLAIN, name="torch_dist", from_off=True)
    if "distributed" in areas:
        found["distributed: updates"] = _distributed_updates
    if areas & {"distributed", "torch_dist"}:
        for name in checkpoint.formats("distributed"):
            if name != "torch" or "distributed" in areas:
                found[f"distributed: {name}"] = partial(_resume, fields=_DISTRIBUTED, name=name, from_off=True)
    if "distributed" in areas:
        found.update(_of_precision_aware(engine))
    if "layer_wise" in areas:
        found["layer_wise: updates"] = _layer_wise_updates
        found["layer_wise: torch_dist"] = _layer_wise_resume
    if "refit" in areas:
        found["refit"] = _refit
    if "schedules" in areas:
        for what, fields in {
            "no pipeline": {},
            "2 stages": {"pipeline_parallel": 2, "data_parallel": 1},
            "2 stages, interleaved": {"pipeline_parallel": 2, "data_parallel": 1, "virtual_pipeline": 2, "layers": 4},
        }.items():
            found[f"schedules: {what}"] = partial(_schedule, fields=fields)
    return found


def _of_precision_aware(engine: str) -> dict[str, Promise]:
    if not engine:

        def left_out(recipe: Recipe) -> str:
            raise LeftOut("it needs TransformerEngine's Python: --transformer-engine FOLDER, its wheel unpacked")

        return {"distributed: precision-aware": left_out}
    config = import_module("megatron.core.optimizer").OptimizerConfig
    # Where main copies are kept in two halves, Megatron can load fewer formats.
    whole = compat.signature_kwargs(config, store_param_remainders=False)
    # Older releases keep halves wherever TransformerEngine can, which they decide by its version.
    told = "" if whole else "2.0"
    fields = {"optimizer": "distributed", "optimizer_extra": {"use_precision_aware_optimizer": True, **whole}}
    return {
        f"distributed: precision-aware, {name}": partial(
            _resume, fields=fields, name=name, from_off=False, engine=(Path(engine), told)
        )
        for name in checkpoint.formats("distributed")
    }


# Trainings --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _laid_out(recipe: Recipe, engine: tuple[Path, str] | None = None) -> Iterator[None]:
    context = contextlib.nullcontext() if engine is None else transformer_engine.in_use(*engine)
    with layout(recipe), context:
        yield


def _build(recipe: Recipe) -> Lab:
    """A model and an optimizer, the same ones every time."""
    seed(recipe.seed)
    return wrap(recipe, build_model(recipe))


def _train(room: Lab, first: int = 0) -> list[float]:
    """Three steps, of which `first` have been taken before; returns their losses."""
    batches = text_batches(room.recipe, seed=7)
    for _ in range(first * room.recipe.micro_batches):
        next(batches)
    return [room.step(batches) for _ in range(STEPS)]


def _end(recipe: Recipe) -> dict[str, torch.Tensor]:
    """Parameters and buffers after a training in a layout of its own."""
    with layout(recipe):
        room = _build(recipe)
        _train(room)
        return checkpoint.parameters(room)


def _buckets(recipe: Recipe) -> str:
    ends = [_end(dataclasses.replace(recipe, **_PLAIN, overlap=overlap)) for overlap in (True, False)]
    same("with and without overlap", *ends)
    return f"{STEPS} steps of 2 ranks end on the same bits with overlapped reduction and without"


def _updates(recipe: Recipe) -> str:
    """An fp32 router weight moves as torch's Adam moves one parameter that is handed the same gradients."""
    this = dataclasses.replace(recipe, overlap=False)
    with layout(this):
        room = _build(this)
        routers = dict(room.routers())
        alone = {name: router.weight.detach().double().requires_grad_() for name, router in routers.items()}
        adam = torch.optim.AdamW(alone.values(), lr=this.lr, weight_decay=0.0)
        batches = text_batches(this, seed=7)
        for _ in range(STEPS):
            room.step_without_optimizer(batches)
            for name, router in routers.items():
                alone[name].grad = router.weight.main_grad.detach().double()
            room.optimizer.step()
            adam.step()
        for name, router in routers.items():
            # fp32 spacing at 0.1 is 7e-9, and there are three steps of 1e-3.
            away = float((router.weight.detach().double() - alone[name]).abs().max())
            if router.weight.dtype != torch.float32 or away > 5e-8:
                raise Failed(f"{name}.weight is {router.weight.dtype}, and {away:.1e} from where Adam moves it in fp64")
    return f"{STEPS} steps move fp32 router weights as Adam does in fp64"


def _distributed_updates(recipe: Recipe) -> str:
    ends = [_end(dataclasses.replace(recipe, **fields)) for fields in (_PLAIN, _DISTRIBUTED)]
    same("the distributed optimizer and one that is not", *ends)
    return f"{STEPS} steps of 2 ranks end on the bits of ranks that update everything"


def _layer_wise_updates(recipe: Recipe) -> str:
    modes = _layer_wise_modes()
    this = dataclasses.replace(recipe, layers=1, overlap=False, expert_bias=False)
    ends = []
    for mode in ("plain", *modes):
        with layout(this):
            room = layer_wise.build(this, mode)
            _train(room)
            ends.append(layer_wise.parameters(room))
    for mode, end in zip(modes, ends[1:], strict=True):
        same(mode, ends[0], end)
    return f"{STEPS} steps of 2 ranks end on the bits of ranks that update everything ({', '.join(modes)})"


def _layer_wise_modes() -> list[str]:
    found = layer_wise.modes()
    if not found:
        raise LeftOut("this Megatron has no layer-wise optimizer")
    return found


def _layer_wise_resume(recipe: Recipe) -> str:
    this = dataclasses.replace(recipe, layers=1, overlap=False, expert_bias=False)
    modes = [mode for mode in _layer_wise_modes() if mode != "overlap"]
    for mode in modes:
        with layout(this):
            _resumed(lambda mode=mode: layer_wise.build(this, mode), "torch_dist")  # type: ignore[misc]
    return f"{RESUMED} ({', '.join(modes)})"


def _schedule(recipe: Recipe, fields: dict[str, Any]) -> str:
    this = dataclasses.replace(recipe, **fields)
    with layout(this):
        return update(dataclasses.replace(this, seq_length=256, micro_batch=4))


def _refit(recipe: Recipe) -> str:
    """Weights of rank 0 go over to rank 1. Router weights are rounded or widened by the rank that sends them."""
    if find_spec("megatron.core.resharding") is None:
        raise LeftOut("this Megatron has no refit")
    dtypes = {"all": torch.float32, "buffers": torch.bfloat16, "off": torch.bfloat16}
    cases = (("all", "off"), ("buffers", "all"), ("all", "all"))
    found: list[Any] = []
    with layout(recipe):
        alone = refit.groups()
        for case in cases:
            refit.forget_plans()
            with _protecting(case[dist.get_rank()]):
                mine = refit.model(recipe, dist.get_rank(), alone)
                refit.hand_over(mine, refit.other_side(mine))
            ranks: list[Any] = [None, None]
            dist.all_gather_object(ranks, {name: value.detach() for name, value in mine.named_parameters()})
            found.append(ranks)
    for case, (sent, got) in zip(cases, found, strict=True):
        for name, value in sent.items():
            wanted = [dtypes[setting] if "router" in name else torch.bfloat16 for setting in case]
            if [value.dtype, got[name].dtype] != wanted or not torch.equal(got[name], value.to(wanted[1])):
                raise Failed(f"{name} leaves as {value.dtype} and arrives as {got[name].dtype}, with other values")
    return "router weights arrive rounded to bf16, widened to fp32, or as they are; all others as they are"


@contextlib.contextmanager
def _protecting(setting: str) -> Iterator[None]:
    """Run with this value of PROTECT on this rank, or without the plugin where it is "off"."""
    with _without_plugin():
        if setting != "off":
            enable(protect=setting)
        yield
        disable()


# Checkpoints ------------------------------------------------------------------------------------------------------


def _resume(
    recipe: Recipe, *, fields: dict[str, Any], name: str, from_off: bool, engine: tuple[Path, str] | None = None
) -> str:
    this = dataclasses.replace(recipe, **fields)
    with _laid_out(this, engine):
        failure = _failure(lambda: _resumed(lambda: _build(this), name))
    without_bias = dataclasses.replace(this, expert_bias=False)  # which upstream's loads round in some releases
    if failure:
        with _laid_out(this, engine), _without_plugin():
            upstreams = _failure(lambda: _resumed(lambda: _build(without_bias), name))
        if not upstreams:
            raise Failed(failure)
        raise LeftOut(f"this Megatron cannot save or load it without the plugin either: {upstreams}")
    if not from_off:
        return RESUMED
    with _laid_out(without_bias, engine):
        _from_off(without_bias, name)
    return f"{RESUMED}; a run without the plugin is resumed with its main copies and moments"


def _failure(action: Callable[[], object]) -> str:
    """The error that stopped `action`, in words, or "". Failed, that something differs, is raised."""
    try:
        action()
    except Failed:
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = str(error).strip().partition("\n")[0] or f"{place.line} ({Path(place.filename).name}:{place.lineno})"
        return f"{type(error).__name__}: {said}"
    return ""


@contextlib.contextmanager
def _without_plugin() -> Iterator[None]:
    disable()
    try:
        yield
    finally:
        enable()


@contextlib.contextmanager
def _shared_folder() -> Iterator[Path]:
    """A new folder that both ranks see, until both have left it."""
    name: list[Any] = [None]
    with contextlib.ExitStack() as stack:
        if dist.get_rank() == 0:
            name = [stack.enter_context(tempfile.TemporaryDirectory())]
        dist.broadcast_object_list(name)
        yield Path(name[0]) / "checkpoint"
        dist.barrier()


def _resumed(build: Callable[[], Lab], name: str) -> None:
    """Save after three steps, load into a new model: both have to end on the same bits three steps later."""
    room = build()
    _train(room)
    middle = checkpoint.snapshot(room)
    other = build()
    with _shared_folder() as folder:
        checkpoint.save(room, folder, name)
        checkpoint.load(other, folder, name)
    loaded = checkpoint.snapshot(other)
    losses = [_train(one, STEPS) for one in (room, other)]
    ends = [checkpoint.snapshot(one) for one in (room, other)]
    same("saved and loaded", middle, loaded)
    same(f"{STEPS} steps after the load", *ends)
    if losses[0] != losses[1]:
        raise Failed(f"the loaded run has the losses {losses[1]}, and the saved one {losses[0]}")


def _from_off(recipe: Recipe, name: str) -> None:
    """A run without the plugin is saved, and loaded with it: main copies and moments keep their bits and places."""
    with _shared_folder() as folder:
        with _without_plugin():
            room = _build(recipe)
            _train(room)
            saved = _whole(room)
            checkpoint.save(room, folder, name)
        other = _build(recipe)
        checkpoint.load(other, folder, name)
        loaded = _whole(other)
    same("saved without the plugin, loaded with it", saved, loaded)
    for router_name, router in other.routers():
        (main,) = (value for key, value in loaded.items() if key.endswith(f"{_short(router_name)}.weight.main"))
        if not torch.equal(router.weight.detach().view(-1), main):
            raise Failed(f"{router_name}.weight is not the main copy that was saved without the plugin")


def _short(name: str) -> str:
    """A router's name from `decoder` on, without what wrappers put before it."""
    return name[name.index("decoder") :]


def _whole(room: Lab) -> dict[str, torch.Tensor]:
    """Main copies and moments of all ranks, each joined to one flat tensor.

    Ranks of a distributed optimizer have slices of them, which are cut differently with the plugin and without.
    """
    held = checkpoint.snapshot(room)
    mine = {
        name: (int(held.get(f"{name.rpartition('.')[0]}.range", torch.tensor([0]))[0]), value.view(-1))
        for name, value in held.items()
        if name.endswith((".main", ".exp_avg", ".exp_avg_sq"))
    }
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    found: dict[str, torch.Tensor] = {}
    for name in sorted({name for rank in ranks for name in rank}):
        parts = [rank[name] for rank in ranks if name in rank]
        joined = torch.full((max(start + part.numel() for start, part in parts),), float("nan"))
        for start, part in parts:
            joined[start : start + part.numel()] = part
        found[name] = joined
    return found
