"""TensorBoard and W&B: Megatron's own writers where megatron.training has them. Imported only where there is one."""

from __future__ import annotations

import sys
from typing import Any, Final

from megatron_fp32_router.monitor.outside import attempt
from megatron_fp32_router.monitor.sinks import TRAINING, Entries, aggregate, megatron_writers, path
from megatron_fp32_router.patching.registry import registry

#: In front of every name in TensorBoard and W&B.
PREFIX: Final = "moe_router"

#: What is worth a curve for every single layer in TensorBoard and W&B; monitor.jsonl has everything.
PER_LAYER: Final = ("load/max_vio", "load/dead_experts", "bias/spread", "update/swallowed", "flips/bf16_weight")

_own_writer: Any = None


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


def publish(step: int, entries: Entries) -> None:
    """Hand the aggregates, and PER_LAYER of every layer, to the writers that this rank has."""
    tensorboard, wandb = megatron_writers()
    ours = tensorboard is None and TRAINING not in sys.modules
    wanted = {
        f"{PREFIX}/{name}": value
        for name, value in flat(entries).items()
        if not name.startswith("layer_") or name.partition("/")[2] in PER_LAYER
    }

    def to_tensorboard() -> None:
        writer = _writer_of_our_own() if ours else tensorboard
        for name, value in wanted.items() if writer is not None else ():
            writer.add_scalar(name, value, step)

    attempt("TensorBoard", to_tensorboard)
    if wandb is not None:
        attempt("W&B", lambda: wandb.log(wanted, step))


def _writer_of_our_own() -> Any:
    """TensorBoard beside monitor.jsonl, for programs without megatron.training, where it is installed."""
    global _own_writer
    if _own_writer is None and path().exists():  # else append() has said why not
        _own_writer = False  # tried once, whatever comes of it
        from torch.utils.tensorboard import SummaryWriter

        _own_writer = SummaryWriter(log_dir=registry.settings.monitor_dir)
    return _own_writer or None
