"""What a look found, and the file that it is written to: monitor.jsonl."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypedDict

from megatron_fp32_router.log import say
from megatron_fp32_router.patching.megatron import of_module
from megatron_fp32_router.patching.registry import registry
from megatron_fp32_router.version import __version__

#: Prefix of a metric: how many values of the tensor that follows are NaN or infinite.
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


def by_metric(entries: Entries) -> dict[str, dict[Layer, float]]:
    """Metric -> layer -> number, for the layers that have it."""
    found: dict[str, dict[Layer, float]] = {}
    for layer, entry in entries.items():
        for name, value in entry["metrics"].items():
            found.setdefault(name, {})[layer] = value
    return found


def aggregate(entries: Entries) -> dict[str, float]:
    """Name/max, /mean, /min, /p10, /p50 and /p90 of every metric over all layers that have it."""
    found = {}
    for name, by_layer in by_metric(entries).items():
        ordered = sorted(by_layer.values())
        found[f"{name}/max"], found[f"{name}/min"] = ordered[-1], ordered[0]
        # Numbers near the end of fp64's range would overflow in a sum.
        found[f"{name}/mean"] = math.fsum(value / len(ordered) for value in ordered)
        for percent in (10, 50, 90):
            found[f"{name}/p{percent}"] = _percentile(ordered, percent)
    return found


def _percentile(ordered: list[float], percent: int) -> float:
    """Linear between the two nearest values, as NumPy's default."""
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] * (1 - (place - low)) + ordered[high] * (place - low)


# The file --------------------------------------------------------------------------------------------------------


def path() -> Path:
    """Where monitor.jsonl is, or will be."""
    return Path(registry.settings.monitor_dir) / "monitor.jsonl"


def append(step: int, entries: Entries) -> bool:
    """Append a look to monitor.jsonl. False, and one warning, where that is impossible: the training goes on."""
    violations = [f"layer {layer}: {text}" for layer, entry in entries.items() for text in entry["violations"]]
    of_all: Entry = {"metrics": aggregate(entries), "violations": violations}
    records = [{"step": step, "layer": layer, **entry} for layer, entry in {**entries, "all": of_all}.items()]
    like = {"like": registry.settings.like} if registry.settings.like else {}
    records[-1] |= {**like, "about": _about()}
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    file = path()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a+b") as stream:
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                # A job that was killed while it wrote left half a line, which must not swallow ours.
                text = text if stream.read() == b"\n" else f"\n{text}"
            stream.write(text.encode())
    except OSError as error:
        what = f"the monitor cannot write {file}, so looks are missing there: {error}"
        say(logging.WARNING, what, once=True)
        return False
    return True


def _about() -> dict[str, Any]:
    """Versions and settings, for a reader of the file who does not have the job's log."""
    megatron = sys.modules.get("megatron.core")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "plugin": __version__,
        "megatron": "unknown" if megatron is None else str(of_module(megatron)),
        "settings": {name: value for name, value in asdict(registry.settings).items() if value != ""},
    }


def writers() -> tuple[Any, Any]:
    """(TensorBoard, W&B) writers of megatron.training, None where it has none. It has them on the last rank only."""
    module = sys.modules.get(TRAINING)
    return getattr(module, "_GLOBAL_TENSORBOARD_WRITER", None), getattr(module, "_GLOBAL_WANDB_WRITER", None)
