"""README's picture of the demo, a PNG. Only this file of the demo needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from megatron_fp32_router.lab import demo_report as report
from megatron_fp32_router.lab.demo_report import RUNS

if TYPE_CHECKING:
    from pathlib import Path

#: The light colours of the pages. scripts/study uses these and STYLE too.
COLOURS: Final = {"off": "#b35300", "on": "#1f5fc9", "exact": "#6b7280"}
_INK, _SOFT, _LINE = "#23272e", "#59616d", "#d9dde3"
_SHAPES: Final[dict[str, Any]] = {"off": {"ls": (0, (4, 2)), "marker": "s"}, "on": {"ls": "-", "marker": "o"}}

STYLE: Final[Any] = {
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _SOFT,
    "axes.edgecolor": _LINE,
    "axes.titlecolor": _INK,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "legend.frameon": False,
    "lines.linewidth": 2.2,
    "lines.markersize": 5,
}


def _draw_bias(axis: Any, release: dict[str, Any]) -> str:
    """One expert's bias: what exact counts ask for and what happened."""
    seed, layer, expert = report.worst(release)
    for name in RUNS:
        series = release[name][seed]["series"]
        steps = range(len(series["bias"][layer][expert]))
        often = max(1, len(steps) // 8)
        axis.plot(
            steps,
            series["bias"][layer][expert],
            color=COLOURS[name],
            label=f"plugin {name}",
            markevery=often,
            **_SHAPES[name],
        )
        due = "due by exact counts" if name == "off" else None
        axis.plot(steps, series["exact"][layer][expert], color=COLOURS["exact"], ls=(0, (1, 2)), lw=1.6, label=due)
    axis.set_ylabel("expert_bias of one expert")
    axis.margins(y=0.12)
    axis.legend(loc="best")
    stuck, due_in_all = (report.total(release["off"], key) for key in ("stuck", "expected"))
    return f"bf16 swallows {stuck:,} of {due_in_all:,} bias updates whole"


def _draw_counter(axis: Any, release: dict[str, Any]) -> str:
    """The counter's error: the mean of the seeds, and a band from the smallest to the largest."""
    for name in RUNS:
        low, mean, high = report.over_seeds(run["series"]["count_error"] for run in release[name])
        steps, often = range(1, len(mean) + 1), max(1, len(mean) // 8)
        axis.fill_between(steps, low, high, color=COLOURS[name], alpha=0.2, lw=0)
        axis.plot(steps, mean, color=COLOURS[name], label=f"plugin {name}", markevery=often, **_SHAPES[name])
    top = report.span(release["off"], "count_error")[1]
    axis.set_ylabel("counting error, tokens (worst expert)")
    axis.set_ylim(-0.03 * max(1.0, top), 1.3 * max(1.0, top))
    axis.legend(loc="upper left")
    wrong = sum(report.total(release["off"], key) for key in ("stuck", "reversed", "unasked"))
    if not wrong:
        return f"bf16 miscounts up to {top:,.0f} tokens of an expert"
    return f"bf16 miscounts tokens: {wrong:,} bias updates go wrong"


def draw(data: dict[str, Any], path: Path) -> None:
    """Write the picture, a panel for each release: the bias where updates are swallowed, elsewhere the counter.

    Raises:
        OSError: `path` cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    releases = data["releases"]
    with matplotlib.rc_context(STYLE):
        figure: Any = Figure(
            figsize=(6.2 * len(releases) + (0.8 if len(releases) == 1 else 0), 4.6), layout="constrained"
        )
        figure.patch.set_facecolor("white")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.04)
        for axis, release in zip(figure.subplots(1, len(releases), squeeze=False).flat, releases, strict=True):
            what = (_draw_bias if report.stopped(release) else _draw_counter)(axis, release)
            axis.set_xlabel("training step")
            axis.set_title(f"Megatron-Core {release['megatron']}\n{what}", fontweight="bold", pad=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, format="png")
