"""What a look found, and the file that it goes to: monitor.jsonl."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypedDict

from megatron_fp32_router.log import rank, say
from megatron_fp32_router.patching.megatron import of_module
from megatron_fp32_router.patching.registry import registry
from megatron_fp32_router.version import __version__

#: In front of the name of a tensor, of how many values in it are NaN or infinite.
NOT_FINITE: Final = "not_finite/"

#: Where megatron.training keeps its writers. A program without it has its own.
TRAINING: Final = "megatron.training.global_vars"


class Entry(TypedDict):
    """What one look found in one layer."""

    metrics: dict[str, float]
    violations: list[str]


#: Megatron's layer number, or "mtp 1" and the like (casts.layer.layer_of).
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


# The file --------------------------------------------------------------------------------------------------------


def path() -> Path:
    """Where monitor.jsonl is, or will be."""
    return Path(registry.settings.monitor_dir) / "monitor.jsonl"


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
    """The versions and settings behind this look, for readers who do not have the job's log."""
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


def megatron_writers() -> tuple[Any, Any]:
    """(TensorBoard, W&B) writers of megatron.training; it has them on the last rank only. None: not there."""
    module = sys.modules.get(TRAINING)
    return getattr(module, "_GLOBAL_TENSORBOARD_WRITER", None), getattr(module, "_GLOBAL_WANDB_WRITER", None)


def has_writers() -> bool:
    """Whether this rank has a writer beside the file: megatron.training's, or one of our own where that is not used."""
    if any(writer is not None for writer in megatron_writers()):
        return True
    return TRAINING not in sys.modules and rank() == 0 and importlib.util.find_spec("tensorboard") is not None
