"""The two pictures of docs/study.md. Each names in its metadata the results that it shows."""

from __future__ import annotations

import hashlib
import json
from itertools import product
from pathlib import Path
from typing import Any

from megatron_fp32_router.lab.demo_picture import COLOURS, STYLE
from megatron_fp32_router.lab.demo_report import over_seeds
from studies import simulation, training

#: Way of adding up -> colour and marks, told apart by more than hue.
WAYS = {"once": (COLOURS["exact"], ":", "s"), "tree": ("#7a3fb5", "-", "o"), "ring": ("#0f766e", "--", "^")}


def digest(results: list[dict[str, Any]]) -> str:
    """Of the results that a picture shows."""
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()


def draw(trainings: list[dict[str, Any]], simulations: list[dict[str, Any]], folder: Path) -> None:
    """training.png and simulation.png."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        for name, figure, results in (
            ("training", _training(trainings), trainings),
            ("simulation", _simulation(simulations), simulations),
        ):
            figure.patch.set_facecolor("white")
            figure.patch.set_alpha(1)
            figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Description": digest(results), "Software": None})


def _figure(width: float, height: float, rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)


def _training(trainings: list[dict[str, Any]]) -> Any:
    rows, columns = len(training.STARTS), len(training.RELEASES)
    figure, axes = _figure(10, 5.6, rows, columns)
    for (row, start), (column, release) in product(enumerate(training.STARTS), enumerate(training.RELEASES)):
        axis = axes[row][column]
        for plugin, line in ((False, "--"), (True, "-")):
            wanted = (release, plugin, start)
            curves = [run["max_vio"] for run in trainings if (run["release"], run["plugin"], run["start"]) == wanted]
            low, mean, high = over_seeds(curves)
            steps = [training.THINNED * (at + 0.5) for at in range(len(mean))]
            colour = COLOURS["on" if plugin else "off"]
            axis.fill_between(steps, low, high, color=colour, alpha=0.18, lw=0)
            axis.plot(steps, mean, line, color=colour, label=f"plugin {'on' if plugin else 'off'}")
        axis.set_title(f"{release}, biases from {start:g}")
    axes[0][0].set_ylim(bottom=0)  # of all of them, when everything is drawn
    for axis in axes[-1]:
        axis.set_xlabel("step")
    for line in axes:
        line[0].set_ylabel("MaxVio")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return figure


def _simulation(simulations: list[dict[str, Any]]) -> Any:
    figure, axes = _figure(10, 7.4, len(simulation.SPREADS), len(simulation.SHAPES))
    for cell in simulations:
        row, column = simulation.SPREADS.index(cell["spread"]), list(simulation.SHAPES).index(cell["experts"])
        axis = axes[row][column]
        ranks = [entry["ranks"] for entry in cell["rows"]]
        for how, (colour, line, mark) in WAYS.items():
            means = [100 * entry[how][0] for entry in cell["rows"]]
            widths = [100 * entry[how][1] for entry in cell["rows"]]
            axis.errorbar(ranks, means, widths, color=colour, ls=line, marker=mark, ms=4, capsize=2, label=how)
        axis.set_title(f"{cell['experts']} experts, spread {cell['spread']:g}")
        axis.set_xscale("log", base=8)
        axis.set_xticks(ranks, [f"{count:,}" for count in ranks])
        axis.set_ylim(0, 104)
    for axis in axes[-1]:
        axis.set_xlabel("ranks")
    for line in axes:
        line[0].set_ylabel("wrong signs, %")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure
