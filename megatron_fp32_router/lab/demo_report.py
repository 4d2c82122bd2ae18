"""The demo's results as table rows and sentences; demo_page.py draws them.

Everything here is a function of the data that `demo` collects and saves:

    {"torch", "python", "plugin", "date": str, "steps": int, "seeds": [int, …], "recipe": {field: value},
     "choices": [[what, why], …], "releases": [{"megatron": str, "off": [RUN, …], "on": [RUN, …]}, …]}

with one RUN for each seed:

    RUN = {"seed": int, "dtypes": {tensor: [dtype after wrapping, dtype after training]},
           "updates": {"expected", "exact", "wrong_size", "reversed", "stuck", "unasked", "wrong": int},
           "step": float, "count_error": float, "max_vio": float, "disagree": float (share), "tokens_compared": int,
           "reference_weight": str, "loss": float, "cpu_seconds": float,
           "series": {"layers": [name, …], "bias" and "exact": [layer][expert][step 0…], "max_vio", "loss" and
                      "count_error": [step], "wrong": [layer][expert]}}
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from megatron_fp32_router.pages import State

RUNS: Final = ("off", "on")

#: What can become of an update that is due: key in `updates`, and what to call it.
FATES: Final = (
    ("exact", "made exactly"),
    ("wrong_size", "made with another step"),
    ("reversed", "made the wrong way"),
    ("stuck", "swallowed"),
)


def below_fp32(dtype: str) -> bool:
    """Whether a dtype's name stands for a floating-point type with fewer bits than fp32."""
    return dtype in ("bfloat16", "float16") or dtype.startswith("float8")


def low_tensors(runs: list[dict[str, Any]]) -> list[str]:
    """Router tensors that were below fp32 after wrapping or at the end of training."""
    return list(
        dict.fromkeys(name for run in runs for name, kinds in run["dtypes"].items() if any(map(below_fp32, kinds)))
    )


def total(runs: list[dict[str, Any]], key: str) -> int:
    """One of `updates`, summed over seeds."""
    return int(sum(run["updates"][key] for run in runs))


def kept(release: dict[str, Any]) -> bool:
    """Whether the plugin kept every tensor at fp32 or above and made every update right, on this release."""
    on = release["on"]
    return not low_tensors(on) and total(on, "wrong") == 0


def protected(data: dict[str, Any]) -> bool:
    """Whether the plugin did that on every release."""
    return all(kept(release) for release in data["releases"])


def stopped(release: dict[str, Any]) -> bool:
    """Whether most updates without the plugin were swallowed."""
    return total(release["off"], "stuck") > total(release["off"], "expected") // 2


def worst(release: dict[str, Any]) -> tuple[int, int, int]:
    """(seed's index, layer, expert) of the bias that loses most updates without the plugin, which is drawn."""
    return max(
        (
            (i, layer, expert)
            for i, run in enumerate(release["off"])
            for layer, row in enumerate(run["series"]["wrong"])
            for expert in range(len(row))
        ),
        key=lambda place: release["off"][place[0]]["series"]["wrong"][place[1]][place[2]],
    )


def span(runs: list[dict[str, Any]], key: str) -> tuple[float, float]:
    """The smallest and the largest over seeds."""
    values = [float(run[key]) for run in runs]
    return min(values), max(values)


def over_seeds(curves: Iterable[Sequence[float]]) -> Iterator[tuple[float, ...]]:
    """Three curves out of one for each seed: the smallest, the mean and the largest value of each step."""
    columns = zip(*curves, strict=True)
    return zip(*((min(values), sum(values) / len(values), max(values)) for values in columns), strict=True)


def overlaps(release: dict[str, Any], key: str) -> bool:
    """Whether the range of a figure over the seeds with the plugin overlaps the range without it."""
    (low, high), (other_low, other_high) = (span(release[name], key) for name in RUNS)
    return low <= other_high and other_low <= high


# The table -----------------------------------------------------------------------------------------------------------


def header(data: dict[str, Any]) -> list[str]:
    """Column heads of `rows`."""
    return ["", *(f"{release['megatron']} {name}" for release in data["releases"] for name in RUNS)]


def rows(data: dict[str, Any]) -> list[list[str]]:
    """The table: what, then each release off and on. HTML and terminal show the same one."""
    columns = [release[name] for release in data["releases"] for name in RUNS]

    def row(label: str, show: Any) -> list[str]:
        return [label, *(show(runs) for runs in columns)]

    def fate(key: str) -> Any:
        return lambda runs: _of(total(runs, key), total(runs, "expected"))

    names = list(dict.fromkeys(name for runs in columns for name in runs[0]["dtypes"]))
    return [
        row("largest error of the token counter", lambda runs: f"{span(runs, 'count_error')[1]:,.0f} tokens"),
        row("bias updates that were due", lambda runs: f"{total(runs, 'expected'):,}"),
        *(row(f"… {words}", fate(key)) for key, words in FATES),
        row("usual step of an update", lambda runs: f"{step:.7f}" if (step := usual_step(runs)) else "none"),
        row("bias moved where it was balanced", lambda runs: f"{total(runs, 'unasked'):,}"),
        *(row(f"dtype of {name}", lambda runs, name=name: _dtype(runs[0]["dtypes"].get(name))) for name in names),
        row("tokens routed unlike fp64", lambda runs: _range(runs, "disagree", ".2%")),
        row("load violation at the end, MaxVio", lambda runs: _range(runs, "max_vio", ".2f")),
        row("loss at the end (nats per byte)", lambda runs: _range(runs, "loss", ".3f")),
    ]


def usual_step(runs: list[dict[str, Any]]) -> float:
    """The median step of an update that went the right way; 0 if none did."""
    return float(statistics.median_high(run["step"] for run in runs))


def _dtype(kinds: list[str] | None) -> str:
    if kinds is None:
        return "absent"
    # Upstream casts expert_bias back to fp32 in its first forward, so there may be two.
    return kinds[0] if kinds[0] == kinds[1] else f"{kinds[0]}, then {kinds[1]}"


def _of(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})" if whole else f"{part:,}"


def _range(runs: list[dict[str, Any]], key: str, form: str) -> str:
    low, high = (format(value, form) for value in span(runs, key))
    return low if low == high else f"{low} to {high}"


# Sentences -----------------------------------------------------------------------------------------------------------


def without(release: dict[str, Any], rate: float) -> str:
    """What happens without the plugin, in one sentence."""
    runs = release["off"]
    due, stuck, turned = (total(runs, key) for key in ("expected", "stuck", "reversed"))
    parts = []
    error = span(runs, "count_error")[1]
    if error:
        parts.append(f"the token counter is wrong by up to {error:,.0f} tokens")
    if stuck:
        parts.append(f"{stuck:,} of {due:,} bias updates are swallowed")
    if turned:
        parts.append(f"{turned:,} of {due:,} go the wrong way")
    if total(runs, "unasked"):
        parts.append(f"{total(runs, 'unasked'):,} move a balanced expert")
    if total(runs, "wrong_size"):
        step = usual_step(runs)
        parts.append(
            f"{total(runs, 'wrong_size'):,} of {due:,} move by another step than {rate:g}, usually by {step:.7f} "
            f"({abs(step / rate - 1):.3%} {'less' if step < rate else 'more'})"
        )
    return f"{_joined(parts)}." if parts else "every update is exact by itself, and so is the token counter."


def with_plugin(release: dict[str, Any]) -> str:
    """What happens with it."""
    runs = release["on"]
    if kept(release):
        return (
            f"all {total(runs, 'expected'):,} updates are exact, bit for bit; the counter is wrong by "
            f"{span(runs, 'count_error')[1]:,.0f} tokens; no router tensor is below fp32."
        )
    low = _joined(low_tensors(runs)) or "nothing"
    return f"THE PLUGIN DID NOT KEEP ITS PROMISE: {total(runs, 'wrong'):,} wrong updates; below fp32: {low}."


def noise(release: dict[str, Any], key: str, name: str) -> str:
    """One outcome off and on in a sentence, which says whether the difference may be noise."""
    off, on = (_range(release[run], key, ".2f" if key == "max_vio" else ".3f") for run in RUNS)
    count = len(release["off"])
    seeds = f"{count} seed{'' if count == 1 else 's'}"
    if overlaps(release, key) or count < 2:
        return f"{name} {off} off, {on} on ({seeds}): noise, no difference that this demo could show."
    return (
        f"{name} {off} off, {on} on ({seeds}): the seeds' ranges do not overlap; a short run proves no more than that."
    )


def findings(data: dict[str, Any]) -> list[tuple[State, str, str]]:
    """(state, about what, sentence): what happens on each release, off and on."""
    rate = data["recipe"]["bias_rate"]
    said: list[tuple[State, str, str]] = []
    for release in data["releases"]:
        harmless = not low_tensors(release["off"]) and total(release["off"], "wrong") == 0
        megatron = f"Megatron-Core {release['megatron']}"
        said.append(("good" if harmless else "bad", f"{megatron}, plugin off", without(release, rate)))
        said.append(("good" if kept(release) else "bad", f"{megatron}, plugin on", with_plugin(release)))
    return said


def outcomes(data: dict[str, Any]) -> list[str]:
    """The results of the trainings, whose differences are mostly noise."""
    said = []
    for release in data["releases"]:
        for key, name in (("max_vio", "load violation at the end (MaxVio)"), ("loss", "loss at the end")):
            said.append(f"Megatron-Core {release['megatron']}: {noise(release, key, name)}")
        off, on = release["off"], release["on"]
        said.append(
            f"Megatron-Core {release['megatron']}: the router sends {_range(off, 'disagree', '.2%')} of "
            f"{off[0]['tokens_compared']:,} tokens to another set of experts than an fp64 computation from "
            f"{off[0]['reference_weight']} does; with the plugin {_range(on, 'disagree', '.2%')}."
        )
    return said


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" and {parts[-1]}" if parts else ""
