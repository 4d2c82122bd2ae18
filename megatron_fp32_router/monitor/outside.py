"""Writes looks to a text file for Prometheus, and to the W&B run of a program without megatron.training."""

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

#: Beside monitor.jsonl. node_exporter reads no other suffix, so not the file that is still being written either.
PROMETHEUS: Final = "monitor.prom"


def hand_on(step: int, entries: Entries, *, file: bool = True) -> None:
    """Write a look of all layers to both, on rank 0. A failure is one line in the log.

    Args:
        file: whether the folder can be written to. Where it cannot, sinks.append() has warned.
    """
    if file:
        attempt("the text file for Prometheus", lambda: _to_prometheus(step, entries))
    if "wandb" in sys.modules and sinks.TRAINING not in sys.modules:
        from megatron_fp32_router.monitor import wandb_run

        attempt("W&B", lambda: wandb_run.log(step, entries))


def attempt(name: str, write: Callable[[], None]) -> None:
    """Call a writer. It may fail in any way; that ends neither the training nor the monitor."""
    try:
        write()
    except Exception as error:
        what = f"the monitor cannot write to {name}: {type(error).__name__}: {' '.join(str(error).split())}"
        say(logging.WARNING, what, once=True, speaker=rank())


# Prometheus ------------------------------------------------------------------------------------------------------


def _to_prometheus(step: int, entries: Entries) -> None:
    file = sinks.path().with_name(PROMETHEUS)
    partial = file.with_suffix(".partial")
    file.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text("".join(f"{line}\n" for line in exposition(step, entries)), encoding="utf-8")
    os.replace(partial, file)  # a reader sees one look or the next, never a part


def exposition(step: int, entries: Entries) -> Iterator[str]:
    """The lines of Prometheus' text format: a gauge for each metric, with a sample for each layer that has it.

    No aggregates: Prometheus computes its own, and would count ours as another layer.
    """
    gauges = sinks.by_metric(entries)
    gauges["violations"] = {layer: len(entry["violations"]) for layer, entry in entries.items()}
    gauges["step"] = {"": step}
    for metric, by_layer in gauges.items():
        name = "moe_router_" + re.sub(r"[^a-zA-Z0-9_]", "_", metric)
        yield f"# HELP {name} {metric} of the monitor of megatron-fp32-router."
        yield f"# TYPE {name} gauge"
        for layer, value in by_layer.items():
            label = "" if layer == "" else f'{{layer="{layer}"}}'
            yield f"{name}{label} {value!r}"
