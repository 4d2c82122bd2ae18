"""docs/performance.md, written from nothing but docs/bench/*.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "performance.md"

INTRODUCTION = """\
# What it costs

`{command}` measures, writes `docs/bench/*.json`, and writes this page from these files; `tests/test_performance.py`
fails if the page does not match them. A ratio is the time with the plugin over the time without it: the median over
pairs that were measured in turn in one process, and in brackets the range of the middle half of the pairs.

{machine}
"""

NO_GPU = """\
Not measured: there was no GPU. On a machine with one, run this with an interpreter that has torch for CUDA and what
the extra `dev` brings; no network is needed:

    scripts/gpu --megatron TREE        # tests/gpu, doctor --device, docs/bench/gpu.json and this page; under 8 minutes

`doctor --device` ([check.md](check.md#the-gpu-device)) measures the GPU and the router shapes of a user, and says where
`MEGATRON_FP32_ROUTER_PRODUCTS=fp32` is faster.

The least time that the forward can take in any implementation, in milliseconds, computed from the vendor's peaks for an
H100 SXM (`bound_ms` in `scripts/benchmarks/gating.py`):
"""


def load(name: str) -> dict[str, Any] | None:
    """What docs/bench holds under this name, or None."""
    path = ROOT / "docs" / "bench" / f"{name}.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write() -> None:
    """Write docs/performance.md."""
    PAGE.write_text(render(load("cpu"), load("gpu")), encoding="utf-8")


def render(cpu: dict[str, Any] | None, gpu: dict[str, Any] | None) -> str:
    """The page."""
    if cpu is None:
        raise FileNotFoundError("docs/bench/cpu.json: run scripts/bench first")
    parts = [
        INTRODUCTION.format(command=cpu["command"], machine=_machine(cpu["machine"])),
        *(writer(cpu[name]) for name, writer in WRITERS.items() if name in cpu and name not in ("gating", "monitor")),
    ]
    parts.append("## The router's products on a GPU\n\n" + (_gating(gpu) if gpu else _not_measured()))
    if "gating" in cpu:
        parts.append("## The router's products on a CPU\n\n" + _gating(cpu))
    if "balance" in cpu:
        parts.append(_growth(cpu))
    if "monitor" in cpu:
        parts.append(_monitor(cpu["monitor"]))
    return "\n".join(parts)


def tables(results: dict[str, Any]) -> str:
    """What was just measured, for a terminal."""
    return "\n".join(
        _gating(results) if name == "gating" else writer(results[name])
        for name, writer in WRITERS.items()
        if name in results
    )


def _machine(machine: dict[str, Any]) -> str:
    release = f"megatron-core {machine['megatron']}, " if machine["megatron"] else ""
    gpu = f"{machine['gpu']}, " if machine["gpu"] else ""
    return (
        f"Measured on {machine['date']}: {gpu}{machine['cores']} cores of {machine['cpu']}, "
        f"{machine['threads']} threads, load {machine['load_at_start']} at the start; Python {machine['python']}, "
        f"torch {machine['torch']}, {release}megatron-fp32-router {machine['plugin']}."
    )


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; all columns but the first are aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _ratio(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.3f} ({row['ratio_from']:.3f} to {row['ratio_to']:.3f})"


def _startup(found: dict[str, Any]) -> str:
    names = {
        "absent": "plugin not installed",
        "off": "installed, MEGATRON_FP32_ROUTER unset",
        "on": "MEGATRON_FP32_ROUTER=1, no Megatron imported",
    }
    rows = [
        (
            text,
            f"{found[way]['ms']:.1f}",
            ""
            if way == "absent"
            else f"{found[way]['more_ms']:.2f} ({found[way]['more_from_ms']:.2f} to {found[way]['more_to_ms']:.2f})",
        )
        for way, text in names.items()
    ]
    return (
        f"## Interpreter start\n\nMilliseconds of `python -c pass`, {found['starts']} starts of each kind in turn.\n\n"
        + markdown_table(("", "start", "more than without"), rows)
    )


def _construction(found: dict[str, Any]) -> str:
    memory = [
        "not measured" if found[f"{way}_peak_mib"] is None else f"{found[f'{way}_peak_mib']:.1f} MiB"
        for way in ("off", "on")
    ]
    return (
        "## Building a model\n\n"
        f"The laboratory's {found['size']} model, with DDP and its optimizer; {found['pairs']} pairs. Peak memory is "
        "what building it adds to a process of its own.\n\n"
        + markdown_table(
            ("", "off", "on", "on/off"),
            [
                ("time, ms", _ms(found["off_ms"]), _ms(found["on_ms"]), _ratio(found)),
                (
                    "peak memory",
                    *memory,
                    "" if found["off_peak_mib"] is None else f"{found['on_peak_mib'] / found['off_peak_mib']:.3f}",
                ),
            ],
        )
    )


def _step(rows: list[dict[str, Any]]) -> str:
    return (
        "## A training step\n\nThe laboratory's model on a CPU in bf16, two micro-batches; the time from forward to "
        "optimizer.\n\n"
        + markdown_table(
            ("model", "hidden", "layers", "experts", "tokens", "off, ms", "on, ms", "pairs", "on/off"),
            [
                (
                    row["size"],
                    row["recipe"]["hidden"],
                    row["recipe"]["layers"],
                    row["recipe"]["experts"],
                    row["tokens"],
                    _ms(row["off_ms"]),
                    _ms(row["on_ms"]),
                    row["pairs"],
                    _ratio(row),
                )
                for row in rows
            ],
        )
    )


def _optimizers(rows: list[dict[str, Any]]) -> str:
    return (
        "## A training step with other optimizers\n\n"
        f"The {rows[0]['size']} model again. The precision-aware optimizer is TransformerEngine's own FusedAdam, whose "
        "kernels are emulated on a CPU, off and on alike; Muon is Megatron's. With either, the optimizer's step waits "
        "for the device no more often and copies no bf16 parameter more than without the plugin "
        "(`tests/megatron/test_optimizer_step.py`).\n\n"
        + markdown_table(
            ("optimizer", "off, ms", "on, ms", "pairs", "on/off"),
            [(row["optimizer"], _ms(row["off_ms"]), _ms(row["on_ms"]), row["pairs"], _ratio(row)) for row in rows],
        )
    )


def _balance(rows: list[dict[str, Any]]) -> str:
    return (
        "## The balance update\n\nIt runs once a step. Here: all layers, with the zeroing of the counters, on one "
        "rank. Operations, those that torch dispatches, are counted and not timed.\n\n"
        + markdown_table(
            ("layers", "experts", "upstream, ms", "plugin, ms", "on/off", "operations", "upstream's", "share"),
            [
                (
                    row["layers"],
                    row["experts"],
                    _ms(row["off_ms"]),
                    _ms(row["on_ms"]),
                    _ratio(row),
                    row["on"]["operations"],
                    row["off"]["operations"],
                    f"{row['on']['operations'] / row['off']['operations']:.0%}",
                )
                for row in rows
            ],
        )
    )


def _monitor(found: dict[str, Any]) -> str:
    off = found["operations"]["off"]
    more = {name: counted - off for name, counted in found["operations"].items()}
    look = found["ratio"] - 1
    return (
        f"## Monitor\n\nThe laboratory's {found['size']} model under the plugin, in one run that looks at every "
        f"second step; {found['pairs']} pairs of a step that is looked at and the one before it. Without the monitor a "
        f"step has {off:,} operations. With N=100 the monitor costs a hundredth of a look a step.\n\n"
        + markdown_table(
            ("MEGATRON_FP32_ROUTER_MONITOR", "more operations in a step", "time over a step without a look"),
            [
                ("off", 0, ""),
                ("between looks", more["between looks"], ""),
                ("1: a look in every step", more["a look"], _ratio(found)),
                ("100", f"{more['a look']} in one of 100", f"{1 + look / 100:.4f}"),
            ],
        )
    )


def _gating(results: dict[str, Any]) -> str:
    found = results["gating"]
    cpu = found["device"] == "cpu"
    share = "of the CPU's best" if cpu else "of the bound"
    rows = []
    for row in found["rows"]:
        bf16 = row["ways"]["bf16"]["forward_ms"]
        for way, taken in row["ways"].items():
            rows.append(
                (
                    f"{row['model']} ({row['tokens']} x {row['hidden']} x {row['experts']})",
                    way,
                    _ms(taken["forward_ms"]),
                    f"{taken['forward_ms'] / bf16:.2f}",
                    _ms(taken["backward_ms"]),
                    "" if taken["of_bound"] is None else f"{taken['of_bound']:.0%}",
                )
            )
    head = ("tokens x hidden x experts", "arithmetic", "forward, ms", "over bf16", "backward, ms", share)
    text = markdown_table(head, rows)
    if cpu:
        return (
            "Upstream multiplies in bf16 while `moe_router_dtype` is unset, the plugin in fp32 on a CPU. The "
            "times of fp32 include the cast of the activations. Split products are for CUDA: here they are only "
            "emulated.\n\n"
            + text
            + "\nThe CPU's best is what a square product of 1,536 reaches in the same arithmetic.\n"
        )
    return _machine(results["machine"]) + "\n\n" + text


def _not_measured() -> str:
    from benchmarks.gating import PEAKS, SHAPES, bound_ms

    ways = ("bf16", "split", "TF32", "fp32")
    rows = [
        (f"{model} ({t} x {h} x {e})", *(f"{bound_ms(way, t, h, e, PEAKS['H100']):.3f}" for way in ways))
        for model, (t, h, e) in SHAPES.items()
    ]
    return NO_GPU + "\n" + markdown_table(("tokens x hidden x experts", *ways), rows)


def _accuracy(cases: dict[str, Any]) -> str:
    ways = ("fp32", "split", "TF32", "bf16")
    parts = [
        "## Accuracy\n\nErrors against fp64 for bf16 activations and an fp32 weight, relative to the sum of the "
        "absolute terms of each result (as in error bounds of matrix products): maximum / mean. fp32 is this "
        "CPU's; TF32 and split products are emulated. The last line of each table is the share of tokens whose top-8 "
        "experts are not those of fp64.\n"
    ]
    for name, table in cases.items():
        rows = []
        for product, found in table.items():
            if product.startswith("tokens"):
                rows.append((product, *(f"{found[way]:.2%}" for way in ways)))
            else:
                rows.append((product, *(f"{found[way]['max']:.1e} / {found[way]['mean']:.1e}" for way in ways)))
        parts.append(f"{name}:\n\n" + markdown_table(("", *ways), rows))
    return "\n".join(parts)


def _growth(cpu: dict[str, Any]) -> str:
    rows = []
    for row in cpu["balance"]:
        if (row["layers"], row["experts"]) in ((4, 64), (58, 256), (128, 512)):
            off, on = row["off"]["bytes"], row["on"]["bytes"]
            moved = [f"{2 * (ranks - 1) / ranks * payload / 1024:.0f}" for ranks in (8, 4096) for payload in (off, on)]
            rows.append((row["layers"], row["experts"], off, on, *moved))
    return (
        "## As work grows\n\n"
        "Operations of the balance update do not depend on the number of layers (table above). Of what the plugin does "
        "in a step, only the router's own products depend on the number of tokens.\n\n"
        "The table has the bytes that one rank passes to the update's all-reduce, counted, and the KiB that it sends "
        "in a ring of 8 and of 4,096 ranks, 2 (N - 1) / N times that. Integers are four times as wide as upstream's "
        "bf16 counts; they go in one collective a step, as upstream's do, and at these sizes its latency is what "
        "counts.\n\n"
        + markdown_table(
            ("layers", "experts", "upstream, B", "plugin, B", "8 ranks: off", "on", "4,096 ranks: off", "on"), rows
        )
        + "\n"
        + OTHER_GROWTH
    )


_SPLIT_BYTES = 3 * 2 * 256 * 7168  # three bf16 parts

OTHER_GROWTH = f"""\
Split products (on a GPU) hold 6 bytes for every element of the router weights on the device, from the first forward of
a step to its end: {_SPLIT_BYTES / 1e6:.0f} MB for each layer of 256 experts at hidden 7,168,
{58 * _SPLIT_BYTES / 1e9:.1f} GB for 58 of them on one device.

Ranks are compared once, and not in a step: when its model is wrapped, each rank writes what it runs into the store
with which torch.distributed was set up. Afterwards that costs one comparison a step and no byte, whatever the number of
ranks.
"""

WRITERS: dict[str, Any] = {
    "startup": _startup,
    "construction": _construction,
    "step": _step,
    "optimizers": _optimizers,
    "balance": _balance,
    "accuracy": _accuracy,
    "gating": _gating,
    "monitor": _monitor,
}
