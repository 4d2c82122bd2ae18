"""Megatron's own TensorBoard and W&B writers, and the flat names that they get. Imported only where there is one."""

from __future__ import annotations

from typing import Any, Final

from megatron_fp32_router.monitor.outside import attempt
from megatron_fp32_router.monitor.sinks import Entries, aggregate

#: In front of every name in TensorBoard and W&B.
PREFIX: Final = "moe_router"

#: What is worth a curve for every single layer in TensorBoard and W&B; monitor.jsonl has everything.
PER_LAYER: Final = ("load/max_vio", "load/dead_experts", "bias/spread", "update/swallowed", "flips/bf16_weight")


def flat(entries: Entries) -> dict[str, float]:
    """One dict: `layer_3/load/max_vio`, `all/load/max_vio/mean`; `violations` counts the broken promises."""
    found = {
        f"layer_{str(layer).replace(' ', '_')}/{name}": value
        for layer, entry in entries.items()
        for name, value in entry["metrics"].items()
    }
    found |= {f"all/{name}": value for name, value in aggregate(entries).items()}
    found["violations"] = float(sum(len(entry["violations"]) for entry in entries.values()))
    return found


def publish(step: int, entries: Entries, tensorboard: Any, wandb: Any) -> None:
    """Hand the aggregates, and PER_LAYER of every layer, to the writers that are not None."""
    wanted = {
        f"{PREFIX}/{name}": value
        for name, value in flat(entries).items()
        if not name.startswith("layer_") or name.partition("/")[2] in PER_LAYER
    }

    def to_tensorboard() -> None:
        for name, value in wanted.items():
            tensorboard.add_scalar(name, value, step)

    if tensorboard is not None:
        attempt("TensorBoard", to_tensorboard)
    if wandb is not None:
        attempt("W&B", lambda: wandb.log(wanted, step))
