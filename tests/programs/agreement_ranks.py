"""What every rank of tests/test_agreement.py runs."""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

import torch
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
    """Build, take a step, and return how long the building took."""
    started = time.monotonic()
    room = build(recipe, dense_stage=False)
    seconds = time.monotonic() - started
    room.step(lab.text_batches(recipe, seed=1))
    return {"seconds": seconds}


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
    build(recipe, dense_stage=True)  # a second model asks nobody

    if is_last:
        megatron_fp32_router.enable(protect="buffers")
    play("other settings")
    megatron_fp32_router.enable(protect="all")

    version = agreement.__version__
    if is_last:
        agreement.__version__ = "99.0"
    play("other version")
    agreement.__version__ = version

    real = torch.nn.Module.__init__
    if is_last:
        slept: list[float] = []

        def slow(self: Any, *args: Any, **kwargs: Any) -> None:
            if not slept:
                slept.append(1.5)
                time.sleep(1.5)
            real(self, *args, **kwargs)

        torch.nn.Module.__init__ = slow  # type: ignore[method-assign]
    play("slow")
    torch.nn.Module.__init__ = real  # type: ignore[method-assign]
    return outcome
