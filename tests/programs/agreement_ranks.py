"""What every rank of tests/test_agreement.py runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

import megatron_fp32_router
from megatron_fp32_router import lab


def build(recipe: Any, dense_stage: bool) -> Any:
    """A model in training; with `dense_stage`, the first pipeline stage has no router."""
    specs = import_module("megatron.core.models.gpt.gpt_layer_specs")
    real = specs.get_gpt_layer_local_spec
    try:
        if dense_stage and dist.get_rank() == 0:
            specs.get_gpt_layer_local_spec = lambda **_: real(num_experts=None, moe_grouped_gemm=False)
        return lab.build(recipe)
    finally:
        specs.get_gpt_layer_local_spec = real


def train(recipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Build and take a step."""
    build(recipe, dense_stage=False).step(lab.text_batches(recipe, seed=1))
    return {}


def scenes(recipe: Any, arguments: dict[str, Any]) -> dict[str, str]:
    """One build after the other, each as the first of its job; returns what each was stopped by."""
    agreement = import_module("megatron_fp32_router.protect.agreement")
    is_last = dist.get_rank() == dist.get_world_size() - 1
    outcome: dict[str, str] = {}

    def play(name: str, room: str | None = None) -> None:
        dist.barrier()
        agreement._Agreed.group = None
        agreement._ROOM = room or name
        print(f"--- {name}", flush=True)
        try:
            build(recipe, dense_stage=True).step(lab.text_batches(recipe, seed=1))
            outcome[name] = ""
        except megatron_fp32_router.RanksDisagreeError as error:
            outcome[name] = str(error)

    agreement._PATIENCE = 0.5
    play("all alike")
    outcome["left in the store"] = ", ".join(
        key
        for key in ("0", "1", "arrived", "judge", "verdict", "read")
        if dist.barrier() or dist.PrefixStore("all alike", dist.distributed_c10d._get_default_store()).check([key])
    )
    play("all alike, in the same store", room="all alike")
    built = build(recipe, dense_stage=True)  # a second model asks nobody

    def ask(name: str, question: Callable[[], Any]) -> None:
        dist.barrier()
        agreement._Agreed.group = None
        agreement._ROOM = name
        print(f"--- {name}", flush=True)
        question()

    finalize = import_module("megatron.core.distributed.finalize_model_grads")
    wrapping = agreement.publish_when_wrapping(lambda *_: None)
    ask("broadcast_params asks", built.chunks[0].broadcast_params)
    ask("the balance update asks", lambda: finalize._update_router_expert_bias(built.chunks, built.config))
    ask("user buffers ask", lambda: wrapping(None, None, SimpleNamespace(nccl_ub=True), built.chunks[0]))

    if is_last:
        megatron_fp32_router.enable(protect="buffers")
    play("other settings")
    megatron_fp32_router.enable(protect="all")

    version = agreement.__version__
    if is_last:
        agreement.__version__ = "99.0"
    play("other version")
    agreement.__version__ = version

    # A Megatron of the same version with another body of one function, and a monitor that looks on one rank only.
    core, settings = import_module("megatron.core"), agreement.registry.settings
    file = core.__file__
    if is_last:
        core.__file__ = arguments["fork"]
        agreement.registry.settings = replace(settings, monitor=5)
    play("other Megatron and monitor")
    core.__file__, agreement.registry.settings = file, settings

    # Rank 1 comes to its optimizer only when rank 0 has said that it is waiting for it.
    store = dist.distributed_c10d._get_default_store()
    say, agree = agreement.say, agreement._agree

    def say_and_note(*arguments: Any, **options: Any) -> None:
        say(*arguments, **options)
        store.set("rank 0 has said", arguments[1])

    def agree_late(room: Any) -> None:
        if is_last:
            store.wait(["rank 0 has said"])
        agree(room)

    agreement.say, agreement._agree = say_and_note, agree_late
    play("slow")
    agreement.say, agreement._agree = say, agree

    agreement.registry.settings = replace(agreement.registry.settings, agree_timeout=0)
    play("nobody compares")
    return outcome
