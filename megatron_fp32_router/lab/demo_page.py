"""The demo's results as one self-contained HTML page. All functions take the data that demo_report.py describes."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any, Final

from megatron_fp32_router import pages
from megatron_fp32_router.lab import demo_report as report
from megatron_fp32_router.lab.demo_report import FATES, RUNS
from megatron_fp32_router.pages.chart import Band, Chart, Line, side_by_side

if TYPE_CHECKING:
    from collections.abc import Sequence

#: The dashes and the marker of a run on every chart. Its colour has the same name, "off" or "on".
_DASHES: Final[dict[str, tuple[int, ...]]] = {"off": (7, 4), "on": ()}
_MARKERS: Final = {"off": "square", "on": "circle"}

#: CSS classes of page.css, by fate.
_LOOKS: Final = {"exact": "exactly", "wrong_size": "short", "reversed": "reversed", "stuck": "swallowed"}

_STEP: Final = "training step"


def _banded(data: dict[str, Any], release: dict[str, Any], key: str, title: str, label: str, caption: str) -> str:
    """Off and on: the mean of the seeds, and a band from the smallest to the largest."""
    lines, bands, said = [], [], []
    for name in RUNS:
        low, mean, high = report.over_seeds(run["series"][key] for run in release[name])
        lines.append(Line(f"plugin {name}", mean, name, name, _DASHES[name], _MARKERS[name]))
        if len(release[name]) > 1:
            lines += [
                Line(f"{name}: {which} seed", values, name, width=0.75)
                for which, values in (("lowest", low), ("highest", high))
            ]
            bands.append(Band(f"{name}: lowest seed", f"{name}: highest seed", name))
        said.append(f"plugin {name}: from {min(low):.4g} to {max(high):.4g}")
    return Chart(
        f"Megatron-Core {release['megatron']}: {title}",
        caption,
        f"{'; '.join(said)}.",
        _STEP,
        range(1, data["steps"] + 1),
        label,
        lines,
        bands,
        from_zero=key != "loss",
    ).html()


def _bias(data: dict[str, Any], release: dict[str, Any]) -> str:
    """One expert's bias: what exact counts ask for and what happened, without the plugin and with it."""
    seed, layer, expert = report.worst(release)
    lines, said = [], []
    for name in RUNS:
        series = release[name][seed]["series"]
        happened, due = series["bias"][layer][expert], series["exact"][layer][expert]
        lines.append(Line(f"plugin {name}", happened, name, name, _DASHES[name], _MARKERS[name], digits=7))
        lines.append(Line(f"due, plugin {name}", due, "exact", "" if name == "on" else "due", (1, 3), digits=7))
        said.append(f"plugin {name}: {happened[-1]:.6f} at the end, {due[-1]:.6f} was due")
    lost = release["off"][seed]["series"]["wrong"][layer][expert]
    name = release["off"][seed]["series"]["layers"][layer]
    return Chart(
        f"Megatron-Core {release['megatron']}: the bias of one expert",
        f"Expert {expert} of {name}, seed {data['seeds'][seed]}, the expert that loses most: {lost} updates were lost "
        "or went the wrong way. “Due” is computed in integers from the tokens that the same run routed. The two runs "
        "differ because they route differently.",
        f"{'; '.join(said)}.",
        _STEP,
        range(data["steps"] + 1),
        "expert_bias",
        lines,
    ).html()


def _updates(data: dict[str, Any]) -> str:
    """Updates due and what became of them: a bar for each run, and the figures in words."""
    bars = []
    for release in data["releases"]:
        for name in RUNS:
            runs = release[name]
            due = report.total(runs, "expected")
            parts = [(key, report.total(runs, key), words) for key, words in FATES]
            said = ", ".join(f"{count:,} {words}" for _, count, words in parts if count) or "none"
            pieces = "".join(
                f'<i class="{_LOOKS[key]}" style="flex: {count} 0 0"></i>' for key, count, _ in parts if count
            )
            title = f"Megatron-Core {release['megatron']}, plugin {name}: {due:,} updates due"
            bars.append(
                f'<div><strong class="{name}">{escape(title)}</strong><br>{escape(said)}'
                f'<div class="bar" role="img" aria-label="{escape(f"{title}; {said}.")}">{pieces}</div></div>'
            )
    key = " ".join(f'<span><i class="key {_LOOKS[fate]}"></i>{escape(words)}</span>' for fate, words in FATES)
    return f'<div class="share">{"".join(bars)}<p class="soft">{key}</p></div>'


def _outcomes(data: dict[str, Any]) -> str:
    caption = "The line is the mean of the seeds, the band reaches from the smallest to the largest."
    charts: Sequence[str] = [
        _banded(data, release, key, title, label, caption)
        for key, title, label in (
            ("max_vio", "load violation", "MaxVio, mean of layers"),
            ("loss", "loss", "nats per byte"),
        )
        for release in data["releases"]
    ]
    points: list[tuple[pages.State, str]] = [("note", sentence) for sentence in report.outcomes(data)]
    return pages.bullets(points) + side_by_side(*charts)


def render(data: dict[str, Any]) -> str:
    """The page: what happened, then the figures, then what was run."""
    releases = data["releases"]
    counter = side_by_side(
        *(
            _banded(
                data,
                release,
                "count_error",
                "error of the token counter",
                "tokens, worst expert",
                "What the counter holds when the balancer reads it, against the true count.",
            )
            for release in releases
        )
    )
    seeds = ", ".join(map(str, data["seeds"]))
    columns = [name for _ in releases for name in RUNS]
    table = pages.table(report.header(data), report.rows(data), classes=dict(enumerate(columns, 1)))
    choices = "".join(f"<dt>{escape(what)}</dt><dd>{escape(why)}</dd>" for what, why in data["choices"])
    due = sum(report.total(release[name], "expected") for release in releases for name in RUNS)
    return pages.document(
        "What bf16 does to a router",
        "The same small training of a real Megatron, without the plugin and with it.",
        report.findings(data),
        {
            "Megatron": ", ".join(f"Megatron-Core {release['megatron']}" for release in releases),
            "Trained": f"{data['date']}, PyTorch {data['torch']}, Python {data['python']}",
            "Settings": f"{data['steps']} steps, seeds {seeds}; see “What was run, and why”",
            "Sample": f"{due:,} updates that were due, in {len(data['seeds']) * len(columns)} trainings",
        },
        [
            pages.section("Tokens are miscounted", counter),
            pages.section("Updates: due, and made", _updates(data)),
            pages.section("What becomes of a bias", side_by_side(*(_bias(data, release) for release in releases))),
            pages.section("How the trainings went, and what of that is noise", _outcomes(data)),
            pages.section("All figures, off beside on", table),
            pages.section("What was run, and why", f'<dl class="choices">{choices}</dl>'),
        ],
    )
