"""The monitor's report as one HTML page that loads nothing: findings, drawings, and a table of all layers."""

from __future__ import annotations

import html
import itertools
import math
from typing import TYPE_CHECKING, Any, Final

from megatron_fp32_router.drawing import COLOURS, CSS, as_svg, new_figure, style

if TYPE_CHECKING:
    from megatron_fp32_router.monitor.runs import Finding, Run

#: Up to so many layers get a line of their own; more are drawn as a map of layers and steps.
_LINES: Final = 6

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
        "Dead experts of every layer",
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
    ("load/dead_experts", "dead", ".0f"),
    ("bias/mean", "bias mean", ".3f"),
    ("bias/spread", "spread", ".3f"),
    ("bias/distinct_bf16", "distinct in bf16", ".0f"),
    ("flips/bf16_weight", "bf16 weight", ".2%"),
    ("flips/bf16_logits", "bf16 logits", ".2%"),
    ("flips/bf16_bias", "bf16 bias", ".2%"),
    ("flips/tf32", "TF32", ".2%"),
    ("flips/actual", "actual", ".2%"),
    ("probe/changed", "probe", ".1%"),
    ("precision/arithmetic_bits", "bits", ".0f"),
)

_OWN_CSS: Final = """
body { max-width: 74rem; } li.problem { font-weight: 600; } li.problem::marker { color: var(--off); }
table.numbers th, table.numbers td { text-align: right; color: var(--ink); white-space: nowrap; }
table.numbers th:first-child { text-align: left; } table.numbers { font-size: .85rem; }
table.numbers th, table.numbers td { padding: .3rem .55rem; } svg image { image-rendering: pixelated; }
"""


def _palette(number: int) -> list[Any]:
    """So many colours that can be told apart on light and on dark."""
    fixed = [COLOURS["on"][0], COLOURS["off"][0], "#3f9c5a", "#a864c9", "#c79a1b", "#4aa5b5"]
    return fixed[:number]


def _ends(axis: Any, run: Run) -> None:
    axis.set_xlabel("training step")
    axis.xaxis.get_major_locator().set_params(integer=True)
    if len(run.steps) > 1:
        axis.set_xlim(run.steps[0], run.steps[-1])


def _lines(axis: Any, run: Run, metric: str) -> None:
    layers = [layer for layer in run.layers if layer in run.values[metric]]
    for layer, colour in zip(layers, _palette(len(layers)), strict=True):
        axis.plot(run.steps, run.series(metric, layer), ".-", ms=4, color=colour, label=f"layer {layer}")
    _ends(axis, run)


def _band(axis: Any, run: Run, metric: str) -> None:
    """Largest, median and smallest over layers, and the layer that is the largest at the end."""
    columns = []
    for step in run.steps:
        values = sorted(by_step[step] for by_step in run.values[metric].values() if step in by_step)
        columns.append((values[0], values[len(values) // 2], values[-1]) if values else (math.nan,) * 3)
    low, middle, high = zip(*columns, strict=True)
    axis.fill_between(run.steps, low, high, color=COLOURS["exact"][0], alpha=0.25, lw=0, label="all layers")
    axis.plot(run.steps, middle, color=COLOURS["on"][0], label="median of layers")
    now = run.last(metric)
    if now:
        worst = max(now, key=lambda layer: abs(now[layer]))
        axis.plot(run.steps, run.series(metric, worst), color=COLOURS["off"][0], lw=1.2, label=f"layer {worst}")
    _ends(axis, run)


def _map(figure: Any, axis: Any, run: Run, metric: str) -> None:
    """Layers from top to bottom, steps from left to right."""
    layers = [layer for layer in run.layers if layer in run.values[metric]]
    rows = [run.series(metric, layer) for layer in layers]
    steps = run.steps
    middles = [(one + two) / 2 for one, two in itertools.pairwise(steps)]
    edges = [2 * steps[0] - middles[0], *middles, 2 * steps[-1] - middles[-1]]
    # A picture inside the drawing: a rectangle for each look would make the page too large for a long run.
    mesh = axis.pcolormesh(edges, range(len(layers) + 1), rows, cmap="viridis", rasterized=True)
    figure.colorbar(mesh, ax=axis, pad=0.01).outline.set_visible(False)
    axis.grid(visible=False)
    every = max(1, len(layers) // 10)
    axis.set_yticks([index + 0.5 for index in range(0, len(layers), every)], [str(layer) for layer in layers[::every]])
    axis.invert_yaxis()
    axis.set_ylabel("layer")
    axis.set_xlabel("training step")


def _layered(run: Run, metric: str, label: str) -> str:
    name = metric.replace("/", "-").replace("_", "-")
    layers = run.values[metric]
    if len(layers) <= _LINES or len(run.steps) == 1:
        figure, axes = new_figure(11, 2.8)
        (_lines if len(layers) <= _LINES else _band)(axes[0, 0], run, metric)
    else:
        figure, axes = new_figure(11, 3.4, 1, 2)
        _map(figure, axes[0, 1], run, metric)
        _band(axes[0, 0], run, metric)
    axes[0, 0].set_ylabel(label)
    if not metric.startswith("bias/") and all(value >= 0 for by_step in layers.values() for value in by_step.values()):
        axes[0, 0].set_ylim(bottom=-0.02 * max(axes[0, 0].get_ylim()[1], 1e-9))  # a line at 0 is drawn whole
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=6)
    return as_svg(figure, name)


def _flips(run: Run) -> str:
    """What each arithmetic would change: mean over layers."""
    figure, axes = new_figure(11, 3.0)
    axis = axes[0, 0]
    for name, colour in zip(_FLIPS, _palette(len(_FLIPS)), strict=True):
        by_layer = run.values.get(f"flips/{name}")
        if by_layer is None:
            continue
        means = []
        for step in run.steps:
            values = [by_step[step] for by_step in by_layer.values() if step in by_step]
            means.append(sum(values) / len(values) if values else math.nan)
        label = "as it is" if name == "actual" else name.replace("_", " ").replace("tf32", "TF32")
        axis.plot(run.steps, means, ".-", ms=4, color=colour, label=label)
    axis.set_ylabel("share of tokens, mean of layers")
    axis.set_ylim(bottom=-0.02 * max(axis.get_ylim()[1], 1e-9))
    _ends(axis, run)
    figure.legend(loc="outside upper left", ncols=6)
    return as_svg(figure, "flips")


def _table(run: Run) -> str:
    e = html.escape
    columns = [column for column in _COLUMNS if column[0] in run.values]
    head = "".join(f"<th title='{e(metric)}'>{e(title)}</th>" for metric, title, _ in columns)
    now = {metric: run.last(metric) for metric, _, _ in columns}
    rows = []
    for layer in run.layers:
        cells = "".join(
            f"<td>{format(now[metric][layer], form) if layer in now[metric] else '-'}</td>"
            for metric, _, form in columns
        )
        rows.append(f"<tr><th scope=row>{e(str(layer))}</th>{cells}</tr>")
    return (
        f"<div class=wide><table class=numbers><thead><tr><th>layer</th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def render(run: Run, found: list[Finding]) -> str:
    """The page."""
    import matplotlib

    e = html.escape
    drawings = []
    with matplotlib.rc_context(style()):
        for metric, title, label, caption in _LAYERED:
            if metric == "flips/bf16_weight" and any(name.startswith("flips/") for name in run.values):
                drawings.append(
                    (
                        "Flips: what less precision would change",
                        _flips(run),
                        "Tokens of the sample whose set of experts would be another one if only that were narrower. "
                        "“As it is”: whom the router really chose, against fp32; 0 is right.",
                    )
                )
            if metric in run.values:
                drawings.append((title, _layered(run, metric, label), caption))
    problems = sum(finding.problem for finding in found)
    verdict = f"{problems} thing{'' if problems == 1 else 's'} to look into." if problems else "No problems found."
    points = "".join(f"<li{' class=problem' if f.problem else ''}>{e(f.text)}</li>" for f in found)
    body = "".join(
        f"<h2>{e(title)}</h2><figure>{svg}<figcaption>{e(caption)}</figcaption></figure>"
        for title, svg, caption in drawings
    )
    looks = f"{len(run.steps)} look{'' if len(run.steps) == 1 else 's'}"
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>Router monitor, steps {run.steps[0]} to {run.steps[-1]}</title><style>{CSS}{_OWN_CSS}</style></head>"
        f"<body><h1>Router monitor</h1><p class=soft>{e(str(run.path))}: {looks} at {len(run.layers)} routers, "
        f"steps {run.steps[0]} to {run.steps[-1]}.</p>"
        f'<p class="verdict{" bad" if problems else ""}">{e(verdict)}</p><ul>{points}</ul>'
        f"{body}<h2>Every layer at step {run.steps[-1]}</h2>{_table(run)}<p class=soft>From “bf16 weight” to “probe”: "
        "shares of tokens, see the drawings. Bits: significant bits of the arithmetic that computes logits, 24 for "
        "fp32. docs/monitor.md explains every number.</p></body></html>\n"
    )
