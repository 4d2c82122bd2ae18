"""What every rank of tests/test_monitor_faults.py runs: one training after another, with something broken in each."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

import megatron_fp32_router
from megatron_fp32_router import lab, log
from megatron_fp32_router.monitor import collect, look, sinks

STEPS = 5


class Broken:
    """A store whose server has gone, or a writer whose network has."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("injected: Broken pipe")


def _raise(*args: Any, **kwargs: Any) -> Any:
    raise ValueError("injected")


#: Fault -> (where, what is put there). All of these are the monitor's own, and none of the training's.
PLACES: dict[str, tuple[Any, str, Any]] = {
    "look": (look, "see", _raise),
    "hook": (look, "capturing", _raise),
    "read": (look, "read", _raise),
    "store": (collect, "store", Broken),
    "silent": (collect.Exchange, "post", lambda *args: None),
    "file": (sinks, "append", _raise),
}


@contextlib.contextmanager
def broken(fault: str, here: bool) -> Iterator[None]:
    """Break what `fault` names, on this rank if it is the one."""
    with contextlib.ExitStack() as stack:
        if fault == "writers":
            module = ModuleType("megatron.training.global_vars")
            writers = {"_GLOBAL_TENSORBOARD_WRITER": Broken(), "_GLOBAL_WANDB_WRITER": Broken()} if here else {}
            vars(module).update(writers)
            sys.modules[module.__name__] = module
            stack.callback(sys.modules.pop, module.__name__)
        elif fault in PLACES and here:
            owner, name, value = PLACES[fault]
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


def _spoil(fault: str, room: Any) -> None:
    """What happens to the model itself, in the monitor's absence as well."""
    for _, router in room.routers():
        if fault == "cast of every expert_bias":
            router.expert_bias = router.expert_bias.bfloat16()
    for _, router in room.routers()[-1:]:
        if fault == "NaN in weight":
            router.weight.data[0, :3] = float("nan")
        elif fault == "infinity in expert_bias":
            router.expert_bias[0] = float("inf")


def play(recipe: Any, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Play every scene; what each came to on this rank."""
    collect.PATIENCE = arguments["patience"]
    outcomes = []
    for number, scene in enumerate(arguments["scenes"]):
        dist.barrier()
        log._said.clear()
        collect._ROOM = f"scene {number}"
        os.environ["MEGATRON_FP32_ROUTER_MONITOR"] = "2" if scene["on_mismatch"] else "off"
        os.environ["MEGATRON_FP32_ROUTER_MONITOR_DIR"] = scene["folder"]
        megatron_fp32_router.disable()
        megatron_fp32_router.enable(on_mismatch=scene["on_mismatch"] or "raise")
        with _lines() as lines, broken(scene["fault"], here=dist.get_rank() == scene["rank"]):
            outcomes.append({"lines": lines, **_train(replace(recipe, **scene["recipe"]), scene)})
    return outcomes


@contextlib.contextmanager
def _lines() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_fp32_router").addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger("megatron_fp32_router").removeHandler(handler)


def _train(recipe: Any, scene: dict[str, Any]) -> dict[str, Any]:
    lab.seed(1)
    room = _build(recipe, scene["dense_stage"])
    batches, losses = lab.text_batches(recipe, seed=1), []
    started = time.monotonic()
    for step in range(1, STEPS + 1):
        if step == 2 and dist.get_rank() == scene["rank"]:
            room.on_counts.append(lambda room: _spoil(scene["fault"], room))
        losses.append(room.step(batches))
        room.on_counts.clear()
    digest = hashlib.sha256(repr(losses).encode())
    for chunk in room.chunks:
        for tensor in chunk.state_dict().values():
            if isinstance(tensor, torch.Tensor):
                digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    hooks = [len(router._forward_hooks) for _, router in room.routers()]
    return {"seconds": time.monotonic() - started, "bits": digest.hexdigest(), "hooks": hooks}


def _build(recipe: Any, dense_stage: bool) -> Any:
    """With `dense_stage`: no router in the first stage, and embeddings that it shares with the last one."""
    if not dense_stage:
        return lab.build(recipe)
    specs = import_module("megatron.core.models.gpt.gpt_layer_specs")
    model = import_module("megatron.core.models.gpt.gpt_model").GPTModel
    real, init = specs.get_gpt_layer_local_spec, model.__init__

    def tied(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{**kwargs, "share_embeddings_and_output_weights": True})

    functools.update_wrapper(tied, init)
    try:
        model.__init__ = tied
        if dist.get_rank() == 0:
            specs.get_gpt_layer_local_spec = lambda **_: real(num_experts=None, moe_grouped_gemm=False)
        return lab.build(recipe)
    finally:
        specs.get_gpt_layer_local_spec, model.__init__ = real, init
