"""The monitor's report as one HTML page that loads nothing: findings, drawings, and a table of all layers."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Final

from megatron_fp32_router import pages
from megatron_fp32_router.monitor.runs import headline
from megatron_fp32_router.pages.chart import STYLES, Band, Chart, Line, Map, side_by_side

if TYPE_CHECKING:
    from megatron_fp32_router.monitor.runs import Finding, Run

#: Up to so many layers get a line of their own; more are drawn as a map of layers and steps.
_LINES: Final = len(STYLES)

#: Drawings that show every layer: metric, title, label, what it means.
_LAYERED: Final = (
    (
        "load/max_vio",
        "Load: MaxVio of every layer",
        "MaxVio",
        "Tokens of the busiest expert over its fair share, minus one, in the whole global batch. 0 is perfect balance.",
    ),
    (
        "load/dead_experts",
        "Idle experts of every layer",
        "experts without a token",
        "Experts that got no token at all in the global batch of the look.",
    ),
    (
        "bias/mean",
        "Drift of the expert biases",
        "mean of expert_bias",
        "The mean of a layer's biases. It decides nothing, but the larger it is, the fewer digits are left for the "
        "differences that do.",
    ),
    (
        "bias/spread",
        "Spread of the expert biases",
        "largest minus smallest",
        "What the balancer has built up to tell experts apart.",
    ),
    (
        "flips/bf16_weight",
        "Flips with a bf16 weight, every layer",
        "share of tokens",
        "Tokens whose set of experts would be another one if the router's weight were rounded to bf16.",
    ),
    (
        "margin/p10",
        "Margin between chosen and not chosen",
        "10 % of tokens have less",
        "How far the last expert that is chosen is ahead of the next, in the scores that choose. What is smaller than "
        "the error of the arithmetic is decided by rounding.",
    ),
    (
        "probe/changed",
        "Change of routing between looks",
        "share of tokens",
        "Tokens of a fixed batch that go to another set of experts than at the look before. High and not falling means "
        "routing that does not settle.",
    ),
)

_FLIPS: Final = ("bf16_weight", "bf16_logits", "bf16_scores", "bf16_bias", "tf32", "actual")

_COLUMNS: Final = (
    ("load/max_vio", "MaxVio", ".2f"),
    ("load/diversity", "diversity", ".2f"),
    ("load/dead_experts", "idle", ".0f"),
    ("bias/mean", "bias mean", ".3g"),
    ("bias/spread", "spread", ".3g"),
    ("bias/distinct_bf16", "distinct in bf16", ".0f"),
    ("flips/bf16_weight", "bf16 weight", ".2%"),
    ("flips/bf16_logits", "bf16 logits", ".2%"),
    ("flips/bf16_bias", "bf16 bias", ".2%"),
    ("flips/tf32", "TF32", ".2%"),
    ("flips/actual", "actual", ".2%"),
    ("probe/changed", "probe", ".1%"),
    ("precision/arithmetic_bits", "bits", ".0f"),
)

_STEP: Final = "training step"


def _lines(run: Run, metric: str) -> list[Line]:
    layers = [layer for layer in run.layers if layer in run.values[metric]]
    return [
        Line(f"layer {layer}", run.series(metric, layer), colour, str(layer), dash, marker)
        for layer, (colour, dash, marker) in zip(layers, STYLES, strict=False)
    ]


def _band(run: Run, metric: str) -> list[Line]:
    """Largest, median and smallest over layers, and the layer that is the farthest from 0 at the end."""
    columns = []
    for step in run.steps:
        values = sorted(by_step[step] for by_step in run.values[metric].values() if step in by_step)
        columns.append((values[0], statistics.median(values), values[-1]) if values else (math.nan,) * 3)
    low, middle, high = zip(*columns, strict=True)
    lines = [
        Line("smallest", low, "s1", width=1),
        Line("median of layers", middle, "s1", "median"),
        Line("largest", high, "s1", width=1),
    ]
    now = run.last(metric)
    if now:
        worst = max(now, key=lambda layer: abs(now[layer]))
        lines.append(Line(f"layer {worst}", run.series(metric, worst), "s3", str(worst), (7, 4), "triangle"))
    return lines


def _described(run: Run, metric: str) -> str:
    """The last look, for whoever cannot see the drawing."""
    now = run.last(metric)
    if not now:
        return "No number at the last look."
    low, high = min(now, key=lambda layer: now[layer]), max(now, key=lambda layer: now[layer])
    return (
        f"Steps {run.steps[0]} to {run.steps[-1]}. At the last one from {now[low]:.4g} (layer {low}) to "
        f"{now[high]:.4g} (layer {high})."
    )


def _layered(run: Run, metric: str, title: str, label: str, caption: str) -> str:
    layers = run.values[metric]
    few = len(layers) <= _LINES
    zero = not metric.startswith("bias/") and all(
        value >= 0 for by_step in layers.values() for value in by_step.values()
    )
    drawn = Chart(
        title,
        caption,
        _described(run, metric),
        _STEP,
        run.steps,
        label,
        _lines(run, metric) if few else _band(run, metric),
        () if few else (Band("smallest", "largest", "s1"),),
        zero,
    ).html()
    if few or len(run.steps) == 1:
        return drawn
    named = [layer for layer in run.layers if layer in layers]
    rows = [run.series(metric, layer) for layer in named]
    whole = Map(
        f"{title}, as a map",
        "The stronger, the larger. Point at it for a layer's number.",
        _described(run, metric),
        _STEP,
        run.steps,
        "layer",
        [str(layer) for layer in named],
        rows,
    ).html()
    return side_by_side(drawn, whole)


def _flips(run: Run) -> str:
    """What each arithmetic would change: mean over layers."""
    lines, said = [], []
    for name, (colour, dash, marker) in zip(_FLIPS, STYLES, strict=True):
        by_layer = run.values.get(f"flips/{name}")
        if by_layer is None:
            continue
        means = []
        for step in run.steps:
            values = [by_step[step] for by_step in by_layer.values() if step in by_step]
            means.append(sum(values) / len(values) if values else math.nan)
        label = "as it is" if name == "actual" else name.replace("_", " ").replace("tf32", "TF32")
        short = {"actual": "as it is", "tf32": "TF32"}.get(name, name.removeprefix("bf16_"))
        lines.append(Line(label, means, colour, short, dash, marker))
        said.append(f"{label} {means[-1]:.2%}" if not math.isnan(means[-1]) else f"{label} unknown")
    return Chart(
        "Flips: what less precision would change",
        "Tokens of the sample whose set of experts would be another one if only that were narrower. “As it is”: whom "
        "the router really chose, against fp32; 0 is right.",
        f"At the last look: {', '.join(said)}.",
        _STEP,
        run.steps,
        "share of tokens, mean of layers",
        lines,
        from_zero=True,
    ).html()


def _table(run: Run) -> str:
    columns = [column for column in _COLUMNS if column[0] in run.values]
    now = {metric: run.last(metric) for metric, _, _ in columns}
    rows = [
        [
            str(layer),
            *(format(now[metric][layer], form) if layer in now[metric] else "-" for metric, _, form in columns),
        ]
        for layer in run.layers
    ]
    return pages.table(["layer", *(title for _, title, _ in columns)], rows, wide="Every layer at the last look")


def _facts(run: Run) -> dict[str, str]:
    """What was looked at, and with what. A file from before this was written down says so."""
    about = run.about
    looks = f"{len(run.steps)} look{'' if len(run.steps) == 1 else 's'} at {len(run.layers)} routers"
    sample = max((max(by_step.values()) for by_step in run.values.get("sample/tokens", {}).values()), default=0)
    tokens = max((max(by_step.values()) for by_step in run.values.get("load/assignments", {}).values()), default=0)
    sizes = [looks, f"flips and margins from {sample:.0f} tokens of each" if sample else "no token was sampled"]
    if tokens:
        sizes.append(f"load from up to {tokens:,.0f} choices of an expert in a global batch")
    unsaid = "not in this file, which an older version wrote"
    return {
        "File": str(run.path),
        "Plugin in the training": about.get("plugin", unsaid),
        "Megatron": about.get("megatron", unsaid),
        "Looks": f"{about['first']} to {about['last']}" if "first" in about else unsaid,
        "Settings": about.get("settings", unsaid),
        "Sample": "; ".join(sizes),
    }


def render(run: Run, found: list[Finding]) -> str:
    """The page."""
    drawings = []
    for metric, title, label, caption in _LAYERED:
        if metric == "flips/bf16_weight" and any(name.startswith("flips/") for name in run.values):
            drawings.append(_flips(run))
        if metric in run.values:
            drawings.append(_layered(run, metric, title, label, caption))
    points: list[tuple[pages.State, str]] = [("bad" if finding.problem else "note", finding.text) for finding in found]
    return pages.document(
        f"Router monitor, steps {run.steps[0]} to {run.steps[-1]}",
        "Is everything still fp32, do bias updates take effect, is the load even?",
        headline(run, found),
        _facts(run),
        [
            pages.section("What stands out", pages.bullets(points)),
            pages.section("Over the steps", *drawings),
            pages.section(
                f"Every layer at step {run.steps[-1]}",
                _table(run),
                pages.paragraph(
                    "From “bf16 weight” to “probe”: shares of tokens, see the drawings. Bits: significant bits of the "
                    "arithmetic that computes logits, 24 for fp32. docs/monitor.md explains every number."
                ),
            ),
        ],
    )
