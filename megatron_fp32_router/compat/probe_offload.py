"""What the probe tries of the optimizer's CPU offload."""

from __future__ import annotations

import copy
import dataclasses
from importlib.util import find_spec
from typing import Any

import torch

from megatron_fp32_router.compat.probe_proving import RESUMED, STEPS, LeftOut, same
from megatron_fp32_router.lab import Lab, Recipe, build, checkpoint, cpu, seed, text_batches


def offload(recipe: Recipe) -> str:
    """With half of the parameters in host memory: three steps, save, load and three more."""
    if find_spec("megatron.core.optimizer.cpu_offloading") is None:
        raise LeftOut("this Megatron has no CPU offload of the optimizer")
    if not cpu.is_pretending():
        raise LeftOut("it is tried on a machine without a GPU only, where the laboratory pretends that there is one")
    fields = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5, "pin_cpu_grads": False}
    fields["use_precision_aware_optimizer"] = True
    this = dataclasses.replace(
        recipe, optimizer="distributed", overlap=False, seq_length=16, clip_grad=0.0, optimizer_extra=fields
    )

    def made() -> tuple[Lab, Any]:
        seed(this.seed)
        room = build(this)
        return room, checkpoint.optimizers(room)[0].optimizer

    def held(room: Lab, inner: Any) -> dict[str, torch.Tensor]:
        model = {name: value for name, value in room.chunks[0].state_dict().items() if value is not None}
        states = inner.state_dict()["state"]
        moments = {f"{i}.{name}": value for i, state in states.items() for name, value in state.items()}
        return {name: torch.as_tensor(value).clone() for name, value in {**model, **moments}.items()}

    with cpu.offloading():
        room, inner = made()
        batches = text_batches(this, seed=1)
        for _ in range(STEPS):
            room.step(batches)
        before, saved = held(room, inner), copy.deepcopy((room.chunks[0].state_dict(), inner.state_dict()))
        other, other_inner = made()
        other.chunks[0].load_state_dict(
            {name: value for name, value in saved[0].items() if value is not None}, strict=False
        )
        other_inner.load_state_dict(saved[1])
        after = held(other, other_inner)
        ends = []
        for one, optimizer in ((room, inner), (other, other_inner)):
            batches = text_batches(this, seed=2)
            for _ in range(STEPS):
                one.step(batches)
            ends.append(held(one, optimizer))
    same("saved and loaded", before, after)
    same(f"{STEPS} steps after the load", *ends)
    return RESUMED
