"""docs/study.md and its pictures, written from nothing but docs/study/*/*.json."""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Final

from benchmarks.page import markdown_table

from studies import pictures, simulation, training

ROOT: Final = Path(__file__).resolve().parents[2]
RESULTS: Final = ROOT / "docs" / "study"
PAGE: Final = ROOT / "docs" / "study.md"

#: Student's t of five pairs for one interval of 95 %, and for twelve that hold together with 95 % (Bonferroni).
_T_ONE, _T_ALL = 2.776, 5.885

INTRODUCTION = """\
# What it buys, and what it does not

`scripts/study` makes `docs/study/*/*.json`, one file for each training and for each simulation, and writes this
page and its pictures from these files; `tests/test_study.py` fails if the page does not match them.

The plugin makes a router decide and balance as the configuration says. Whether that makes a *better model* is
another question. The trainings here are too small to answer it; this page says what they show.
"""


def load(folder: Path = RESULTS) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(trainings, simulations) that `folder` holds, in the order of the study; those that are missing are left out."""

    def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]

    cells = product(simulation.SHAPES, simulation.SPREADS)
    return (
        read(folder / "training" / f"{run.name}.json" for run in training.runs()),
        read(folder / "simulation" / f"{simulation.cell_name(*cell)}.json" for cell in cells),
    )


def write() -> str:
    """Write the page and its pictures, and say so; or what is missing."""
    trainings, simulations = load()
    wanted = len(training.runs()), len(simulation.SHAPES) * len(simulation.SPREADS)
    if (len(trainings), len(simulations)) != wanted:
        return f"no page yet: {len(trainings)} of {wanted[0]} trainings, {len(simulations)} of {wanted[1]} simulations"
    PAGE.write_text(render(trainings, simulations), encoding="utf-8")
    pictures.draw(trainings, simulations, RESULTS)
    return "docs/study.md is written"


def render(trainings: list[dict[str, Any]], simulations: list[dict[str, Any]]) -> str:
    """The page."""
    parts = [INTRODUCTION, _summary(trainings, simulations), _trainings(trainings), _simulated(simulations)]
    return "\n\n".join(_filled(block) for block in "\n".join(parts).strip().split("\n\n")) + "\n"


def _filled(block: str) -> str:
    """A paragraph or list, in lines of the usual length; anything else as it is."""
    if block.startswith(("|", "#", "!")):
        return block.strip("\n")
    items = block.strip().split("\n- ") if block.startswith("- ") else [block]
    lead, rest = ("- ", "  ") if block.startswith("- ") else ("", "")
    return "\n".join(
        textwrap.fill(
            " ".join(item.removeprefix("- ").split()),
            120,
            initial_indent=lead,
            subsequent_indent=rest,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for item in items
    )


# What was found ------------------------------------------------------------------------------------------------------


def _of(trainings: list[dict[str, Any]], **where: Any) -> list[dict[str, Any]]:
    """Those with these values, in the order of their seeds."""
    return [run for run in trainings if all(run[name] == value for name, value in where.items())]


def _differences(trainings: list[dict[str, Any]], name: str) -> list[tuple[str, float, float, list[float]]]:
    """(release, start, mean off, differences on - off of the pairs of one seed) of every release and start."""
    found = []
    for release, start in product(training.RELEASES, training.STARTS):
        off, on = (_of(trainings, release=release, start=start, plugin=plugin) for plugin in (False, True))
        pairs = [b[name] - a[name] for a, b in zip(off, on, strict=True)]
        found.append((release, start, sum(run[name] for run in off) / len(off), pairs))
    return found


def _interval(values: Sequence[float], t: float) -> tuple[float, float]:
    """Mean, and half the width of its interval."""
    return statistics.mean(values), t * statistics.stdev(values) / len(values) ** 0.5


def _summary(trainings: list[dict[str, Any]], simulations: list[dict[str, Any]]) -> str:
    differing: dict[bool, list[str]] = {True: [], False: []}
    for name, what in (("max_vio_end", "load violation"), ("loss_end", "loss")):
        for release, start, before, pairs in _differences(trainings, name):
            mean, width = _interval(pairs, _T_ALL)
            text = f"{what}, {release}, biases from {start:g}"
            if abs(mean) > width:
                text += f": {before:.4f} without the plugin, {before + mean:.4f} with it"
            differing[abs(mean) > width].append(text)
    on = [run for run in trainings if run["plugin"]]
    wrong_on = sum(run[kind] for run in on for kind in ("swallowed", "reversed", "unasked", "wrong_size"))
    due_on = sum(run["due"] for run in on)
    return "\n".join(
        [
            "## In short",
            "",
            f"- **With the plugin {wrong_on:,} of {due_on:,} updates were wrong**, in {len(on)} trainings on three "
            "releases; the table below has the numbers without it.",
            *_sentences("Differs", differing[True]),
            *_sentences("No difference can be told from chance", differing[False]),
            *_simulated_in_short(simulations),
            "",
            "These are twelve comparisons, each of five pairs of trainings that differ in nothing but the plugin. A "
            "difference counts if it holds with 95 % for all twelve together (Student's t, Bonferroni). Where none was "
            "found in five pairs, there may still be one.",
            "",
        ]
    )


def _sentences(lead: str, found: list[str]) -> list[str]:
    return [f"- **{lead}**: {'; '.join(found)}."] if found else []


def _row(simulations: list[dict[str, Any]], experts: int, spread: float, ranks: int) -> dict[str, Any]:
    (cell,) = (cell for cell in simulations if (cell["experts"], cell["spread"]) == (experts, spread))
    row: dict[str, Any] = next(row for row in cell["rows"] if row["ranks"] == ranks)
    return row


def _simulated_in_short(simulations: list[dict[str, Any]]) -> list[str]:
    rows = {ranks: [_row(simulations, *cell, ranks) for cell in _cells()] for ranks in (1, 4096)}

    def span(ranks: int, how: str) -> str:
        shares = [row[how][0] for row in rows[ranks]]
        return f"{min(shares):.1%} to {max(shares):.1%}"

    beyond = [row["tree_beyond"] for cell in simulations for row in cell["rows"]]
    in_a_tree = max(share[0] for share in beyond if share is not None)
    return [
        f"- **Simulated, on one rank {span(1, 'once')} of the signs are wrong** without the plugin; on 4,096 ranks "
        f"{span(4096, 'tree')} when counts are added up in a tree, and {span(4096, 'ring')} in a ring. In a tree it is "
        f"experts near the mean that get a wrong sign: of those that are more than 1 % off, at most {in_a_tree:.2%} "
        "do, on any number of ranks. With exact counts: none, by construction."
    ]


def _cells() -> list[tuple[int, float]]:
    return list(product(simulation.SHAPES, simulation.SPREADS))


# Trainings -----------------------------------------------------------------------------------------------------------


def _trainings(trainings: list[dict[str, Any]]) -> str:
    settings = training.SETTINGS
    tokens = int(settings["seq_length"]) * int(settings["micro_batch"]) * int(settings["micro_batches"])
    topk, experts = int(settings["topk"]), int(settings["experts"])
    seconds = sum(run["seconds"] for run in trainings)
    text = f"""\
## Trainings

{len(trainings)} trainings of {training.STEPS} steps with a real Megatron on a CPU, {seconds / 60:.0f} minutes
of processor time: {len(training.RELEASES)} releases, the plugin off and on, every bias from 0 and from 0.75
(where a long run is), {len(training.SEEDS)} seeds, which decide weights and text. The model has one layer of
{experts} experts, {topk} for a token, hidden size {settings["hidden"]}; {tokens:,} bytes of real text a step in
{settings["micro_batches"]} micro-batches, so {tokens * topk // experts} tokens per expert on the mean; bf16,
sigmoid scores, Adam at {settings["lr"]:g}, biases by {settings["bias_rate"]:g} a step, one rank. What an update
should have been is computed with NumPy's int64 from the routing maps of the same training.

![Load violation over {training.STEPS} steps, for three releases and two starts, off and on](study/training.png)

Lines are means of {len(training.SEEDS)} seeds, bands reach from the lowest to the highest. MaxVio: tokens of
the busiest expert over the fair share, minus one.

### Updates of the bias

Share of the updates that were due, mean of {len(training.SEEDS)} seeds (lowest to highest). *Step*: how far a
bias went when it went the right way, over the configured rate. *Wrong size*: not that rate to within fp32's
spacing. *Counter*: the largest error of a token counter, in tokens.

"""
    head = [
        "release",
        "biases from",
        "plugin",
        "due",
        "swallowed",
        "wrong way",
        "wrong size",
        "unasked",
        "step",
        "counter",
    ]
    rows = []
    for release, start, plugin in product(training.RELEASES, training.STARTS, (False, True)):
        runs = _of(trainings, release=release, start=start, plugin=plugin)
        steps = [run["step"] for run in runs if run["step"] is not None]
        rows.append(
            [
                release,
                f"{start:g}",
                "on" if plugin else "off",
                f"{sum(run['due'] for run in runs):,}",
                *(_band([run[kind] / run["due"] for run in runs]) for kind in ("swallowed", "reversed", "wrong_size")),
                f"{sum(run['unasked'] for run in runs):,}",
                f"{sum(steps) / len(steps):.5f}" if steps else "none",
                f"{max(run['count_error'] for run in runs):.0f}",
            ]
        )
    text += markdown_table(head, rows)
    text += f"""
### Load violation and loss

Means of the last {training.LAST} steps. The difference is on minus off, the mean of five pairs, each of one seed, with
an interval of 95 % for that one comparison, and in brackets the interval that holds for all twelve together.

"""
    for name, what in (("max_vio_end", "MaxVio"), ("loss_end", "loss, nats per byte")):
        rows = []
        for release, start, before, pairs in _differences(trainings, name):
            mean, one = _interval(pairs, _T_ONE)
            rows.append([release, f"{start:g}", f"{before:.4f}", f"{before + mean:.4f}"])
            rows[-1].append(f"{mean:+.4f} ± {one:.4f} (± {_interval(pairs, _T_ALL)[1]:.4f})")
        text += markdown_table([what, "biases from", "off", "on", "difference"], rows) + "\n"
    return (
        text
        + """\
A difference comes from all repairs of the plugin together, fp32 logits and weights too, not from the update alone.
What this does not show: a long training, where biases have drifted and the load is nearly even; a model whose
quality depends on its balance; more than one rank (below). In so short a training the loss says little: an uneven
router can even have the lower one.
"""
    )


def _band(shares: list[float]) -> str:
    if max(shares) == 0:
        return "0"
    if min(shares) == 1:
        return "100 %"
    return f"{sum(shares) / len(shares):.2%} ({min(shares):.2%} to {max(shares):.2%})"


# Simulation ----------------------------------------------------------------------------------------------------------


def _simulated(simulations: list[dict[str, Any]]) -> str:
    shapes = "\n".join(
        f"- {experts} experts, {topk} for a token; {tokens:,} tokens a rank, so {tokens * topk // experts:,} per expert"
        for experts, (topk, tokens) in simulation.SHAPES.items()
    )
    text = f"""\
## Counts of many ranks, simulated

No Megatron and no network: token counts of each rank are drawn (Poisson) for experts whose loads differ by a
given spread, and added up as bf16 does it, each addition rounded: in a **ring**, where one rank after the other
adds its count to the sum, and in a **tree**, where pairs, and pairs of pairs, are added. **Once** is the best
that bf16 can do: an exact sum, rounded once. Then the sign of the update, in bf16, is compared with the integer
rule. A sign of zero where another one is due counts as wrong: the bias then stays. The plugin itself needs no
simulation: integers give the rule's sign in any order.

{shapes}

With 256 experts on 4,096 ranks that is about the global batch of DeepSeek-V3.

![Share of wrong signs over the number of ranks, for 8, 64 and 256 experts and three spreads](study/simulation.png)

Share of wrong signs among all updates, with an interval of 95 % for the mean over trials. *Off by > 1 %*: the same
among experts whose load is more than 1 % from the mean, for which the update matters most.

"""
    head = [
        "experts",
        "spread",
        "MaxVio",
        "ranks",
        "trials",
        "once",
        "tree",
        "ring",
        "tree, off by > 1 %",
        "ring, off by > 1 %",
    ]
    rows = []
    for cell in simulations:
        for row in cell["rows"]:
            shares = [_share(row[how]) for how in ("once", "tree", "ring", "tree_beyond", "ring_beyond")]
            rows.append(
                [
                    cell["experts"],
                    f"{cell['spread']:g}",
                    f"{row['max_vio']:.3f}",
                    f"{row['ranks']:,}",
                    row["trials"],
                    *shares,
                ]
            )
    return (
        text
        + markdown_table(head, rows)
        + """
In a ring the sum soon is so large that a rank's count is less than half of its spacing, and is lost: the sum stands
still, often at the same number for all experts, which then look balanced (100 %). Where it stands depends on the
counts, so the share does not grow evenly with the ranks. In a tree both sides of an addition are of similar size.

What this does not show: in which order a real job adds. That was not looked at, and nothing was measured on a cluster.
Counts of several micro-batches are rounded once more on each rank, which is left out here.
"""
    )


def _share(found: list[float] | None) -> str:
    if found is None:
        return "none there"
    mean, width = found
    return "0" if mean == 0 else f"{mean:.2%} ± {width:.2%}"
