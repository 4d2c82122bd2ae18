"""Where a look goes: monitor.jsonl, and Megatron's own TensorBoard and W&B writers where megatron.training has them."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypedDict

from megatron_fp32_router.log import rank, say
from megatron_fp32_router.patching.megatron import of_module
from megatron_fp32_router.patching.registry import registry
from megatron_fp32_router.version import __version__

#: In front of every name in TensorBoard and W&B.
PREFIX: Final = "moe_router"

#: In front of the name of a tensor, of how many values in it are NaN or infinite.
NOT_FINITE: Final = "not_finite/"

#: What is worth a curve for every single layer in TensorBoard and W&B; monitor.jsonl has everything.
PER_LAYER: Final = ("load/max_vio", "load/dead_experts", "bias/spread", "update/swallowed", "flips/bf16_weight")


class Entry(TypedDict):
    """What one look found in one layer."""

    metrics: dict[str, float]
    violations: list[str]


#: Megatron's layer number, or "mtp 1" and the like (casts.below.layer_of).
Layer = int | str

Entries = Mapping[Layer, Entry]


def order(layer: Layer) -> tuple[bool, int, str]:
    """Sort key: numbered layers first. Pipeline stages with virtual chunks hold layers that are not neighbours."""
    return isinstance(layer, str), layer if isinstance(layer, int) else 0, str(layer)


def aggregate(entries: Entries) -> dict[str, float]:
    """Name/max, /mean, /min, /p10, /p50 and /p90 of every metric over all layers that have it."""
    columns: dict[str, list[float]] = {}
    for entry in entries.values():
        for name, value in entry["metrics"].items():
            columns.setdefault(name, []).append(value)
    found = {}
    for name, values in columns.items():
        found[f"{name}/max"], found[f"{name}/min"] = max(values), min(values)
        # Of numbers near the end of fp64's range the sum would be past it.
        found[f"{name}/mean"] = math.fsum(value / len(values) for value in values)
        for percent in (10, 50, 90):
            found[f"{name}/p{percent}"] = _percentile(values, percent)
    return found


def _percentile(values: list[float], percent: int) -> float:
    """Linear between the two nearest values, as NumPy's default."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] * (1 - (place - low)) + ordered[high] * (place - low)


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


# The file --------------------------------------------------------------------------------------------------------


def path() -> Path:
    """Where monitor.jsonl is, or will be."""
    return Path(registry.settings.monitor_dir) / "monitor.jsonl"


def last_step(file: Path) -> int:
    """The step of the last whole line of `file`; 0 when there is none.

    Or when it cannot be read: append() meets the same trouble, and says so.
    """
    try:
        with file.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - 2**20))
            lines = stream.read(2**20).splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue  # the job was killed while it wrote this line
    return 0


def append(step: int, entries: Entries) -> bool:
    """Add a look to monitor.jsonl, and say whether it is there: a full disk is a warning, and no end of a training."""
    records: list[dict[str, Any]] = [
        {"step": step, "layer": layer, "metrics": entry["metrics"], "violations": entry["violations"]}
        for layer, entry in entries.items()
    ]
    violations = [f"layer {layer}: {text}" for layer, entry in entries.items() for text in entry["violations"]]
    records.append({"step": step, "layer": "all", "metrics": aggregate(entries), "violations": violations})
    if registry.settings.like:
        records[-1]["like"] = registry.settings.like
    records[-1]["about"] = _about()
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    file = path()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a+b") as stream:
            if stream.tell() and _ends_inside_a_line(stream):
                text = "\n" + text
            stream.write(text.encode())
    except OSError as error:
        what = f"the monitor cannot write {file}, so looks are missing there: {error}"
        say(logging.WARNING, what, threshold=registry.settings.log, once=True)
        return False
    return True


def _about() -> dict[str, Any]:
    """What wrote this look, for whoever reads the file without the job's log."""
    settings = {name: value for name, value in asdict(registry.settings).items() if value != ""}
    megatron = sys.modules.get("megatron.core")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "plugin": __version__,
        "megatron": "unknown" if megatron is None else str(of_module(megatron)),
        "settings": settings,
    }


def _ends_inside_a_line(stream: Any) -> bool:
    """Whether the job was killed while it wrote: its last line must not swallow ours."""
    stream.seek(-1, 2)
    last: bytes = stream.read(1)
    return last != b"\n"


# TensorBoard and W&B ---------------------------------------------------------------------------------------------

_own_writer: Any = None


def megatron_writers() -> tuple[Any, Any]:
    """(TensorBoard, W&B) writers of megatron.training; it has them on the last rank only. None: not there."""
    module = sys.modules.get("megatron.training.global_vars")
    if module is None:
        return None, None
    return (
        getattr(module, "_GLOBAL_TENSORBOARD_WRITER", None),
        getattr(module, "_GLOBAL_WANDB_WRITER", None),
    )


def publish(step: int, entries: Entries) -> None:
    """Hand the aggregates, and PER_LAYER of every layer, to the writers that this rank has."""
    tensorboard, wandb = megatron_writers()
    ours = tensorboard is None and "megatron.training.global_vars" not in sys.modules and rank() == 0
    if tensorboard is None and wandb is None and not ours:
        return
    wanted = {
        f"{PREFIX}/{name}": value
        for name, value in flat(entries).items()
        if not name.startswith("layer_") or name.partition("/")[2] in PER_LAYER
    }

    def to_tensorboard() -> None:
        writer = _writer_of_our_own() if ours else tensorboard
        for name, value in wanted.items() if writer is not None else ():
            writer.add_scalar(name, value, step)

    _attempt("TensorBoard", to_tensorboard)
    if wandb is not None:
        _attempt("W&B", lambda: wandb.log(wanted, step))


def _attempt(name: str, write: Callable[[], None]) -> None:
    """Somebody else's writer may fail in any way, which must end neither the training nor the monitor."""
    try:
        write()
    except Exception as error:
        what = f"the monitor cannot write to {name}: {type(error).__name__}: {' '.join(str(error).split())}"
        say(logging.WARNING, what, threshold=registry.settings.log, once=True, speaker=rank())


def _writer_of_our_own() -> Any:
    """TensorBoard beside monitor.jsonl, for programs without megatron.training, where it is installed."""
    global _own_writer
    if _own_writer is None and path().exists():  # else append() has said why not
        _own_writer = False  # tried once, whatever comes of it
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            _own_writer = SummaryWriter(log_dir=registry.settings.monitor_dir)
    return _own_writer or None
