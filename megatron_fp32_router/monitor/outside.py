"""Where else a look goes: a text file for Prometheus, and the W&B run of a program without megatron.training."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Final

from megatron_fp32_router.log import rank, say
from megatron_fp32_router.monitor import sinks
from megatron_fp32_router.monitor.sinks import Entries
from megatron_fp32_router.patching.registry import registry

#: Beside monitor.jsonl. node_exporter reads no other suffix, so not the file that is still being written either.
PROMETHEUS: Final = "monitor.prom"


def hand_on(step: int, entries: Entries, *, file: bool = True) -> None:
    """Give a look, all layers of it, to both. Called on rank 0; whatever fails is one line in the log.

    Args:
        file: whether the folder can be written to. Where it cannot, that has been said of monitor.jsonl.
    """
    if file:
        attempt("the text file for Prometheus", lambda: _to_prometheus(step, entries))
    if "wandb" in sys.modules and sinks.TRAINING not in sys.modules:
        from megatron_fp32_router.monitor import wandb_run

        attempt("W&B", lambda: wandb_run.log(step, entries))


def attempt(name: str, write: Callable[[], None]) -> None:
    """Somebody else's writer may fail in any way, which must end neither the training nor the monitor."""
    try:
        write()
    except Exception as error:
        what = f"the monitor cannot write to {name}: {type(error).__name__}: {' '.join(str(error).split())}"
        say(logging.WARNING, what, threshold=registry.settings.log, once=True, speaker=rank())


# Prometheus ------------------------------------------------------------------------------------------------------


def _to_prometheus(step: int, entries: Entries) -> None:
    file = sinks.path().with_name(PROMETHEUS)
    partial = file.with_suffix(".partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text("".join(f"{line}\n" for line in exposition(step, entries)), encoding="utf-8")
    os.replace(partial, file)  # who reads it sees one look or the next, never a part


def exposition(step: int, entries: Entries) -> Iterator[str]:
    """The lines of Prometheus' text format: a gauge for each metric, with a sample for each layer that has it.

    Aggregates are left to Prometheus, which would count them twice.
    """
    columns: dict[str, dict[str, float]] = {}
    for layer, entry in entries.items():
        for name, value in {**entry["metrics"], "violations": len(entry["violations"])}.items():
            columns.setdefault(name, {})[str(layer)] = value
    yield from _gauge("step", "The training step of the look.")
    yield f"moe_router_step {step}"
    for name, by_layer in columns.items():
        yield from _gauge(name, f"{name} of the monitor of megatron-fp32-router.")
        for layer, value in by_layer.items():
            yield f'{_name(name)}{{layer="{layer}"}} {value!r}'


def _gauge(name: str, text: str) -> Iterator[str]:
    yield f"# HELP {_name(name)} {text}"
    yield f"# TYPE {_name(name)} gauge"


def _name(metric: str) -> str:
    return "moe_router_" + re.sub(r"[^a-zA-Z0-9_]", "_", metric)
