"""A run that the monitor wrote: read from its file, and what stands out in it, in plain sentences."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from megatron_fp32_router.errors import Fp32RouterError
from megatron_fp32_router.monitor.sinks import NOT_FINITE, Layer, order
from megatron_fp32_router.pages import State

_LISTED: Final = 8

#: What a finding is about. "values": not finite.
Topic: TypeAlias = Literal["precision", "load", "values", "file"]

#: MaxVio from which the headline calls a layer uneven: its busiest expert gets twice its fair share.
UNEVEN: Final = 1.0

#: No step or layer comes near. (Numbers of steps until something happens do, as fractions.)
_HUGE: Final = 10**18


class UnreadableRunError(Fp32RouterError):
    """The file is not what the monitor writes."""


@dataclass
class Run:
    """A monitor.jsonl. Where a restart repeated steps, what was written last counts.

    Attributes:
        path: the file.
        steps: of every look, in order.
        layers: in order; numbers first.
        values: metric -> layer -> step -> number.
        violations: (layer, sentence) -> steps of the looks that found it.
        notes: what is wrong with the file itself.
        about: what wrote the last look, and when: plugin, megatron, settings, first, last; empty in old files.
    """

    path: Path
    steps: list[int] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    values: dict[str, dict[Layer, dict[int, float]]] = field(default_factory=dict)
    violations: dict[tuple[Layer, str], list[int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)

    def series(self, metric: str, layer: Layer) -> list[float]:
        """One number for every step; NaN where there is none."""
        found = self.values.get(metric, {}).get(layer, {})
        return [found.get(step, math.nan) for step in self.steps]

    def last(self, metric: str) -> dict[Layer, float]:
        """Layer -> number at the last look; layers without one are left out."""
        step = self.steps[-1]
        by_layer = self.values.get(metric, {})
        return {layer: by_layer[layer][step] for layer in self.layers if step in by_layer.get(layer, {})}


def read(path: Path) -> Run:
    """Read a monitor.jsonl, or the one in a folder.

    Raises:
        UnreadableRunError: there is none, or it holds something else.
    """
    path = path / "monitor.jsonl" if path.is_dir() else path
    if path.is_char_device() or path.is_block_device():
        raise UnreadableRunError(f"{path}: expected a file, found a device")
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UnreadableRunError(f"{path}: {error.strerror}") from error
    records: dict[int, dict[Layer, dict[str, Any]]] = {}
    cut = 0
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except RecursionError as error:
            raise UnreadableRunError(f"{path}, line {number}: lists in lists without end") from error
        except ValueError:
            # A job that is killed while it writes leaves half a line; the next start begins a new one.
            cut += 1
            continue
        if not _is_record(record):
            raise UnreadableRunError(
                f"{path}, line {number}: expected an object with step, layer, metrics (finite numbers), violations"
            )
        records.setdefault(record["step"], {})[record["layer"]] = record
    if not records:
        raise UnreadableRunError(f"{path}: no look of the monitor in it")
    run = Run(path, sorted(records))
    if cut:
        run.notes.append(f"{_count(cut, 'line')} of the file {'is' if cut == 1 else 'are'} cut off and left out")
    layers: set[Layer] = set()
    for step in run.steps:
        for layer, record in records[step].items():
            if layer == "all":
                continue
            layers.add(layer)
            for name, value in record["metrics"].items():
                run.values.setdefault(name, {}).setdefault(layer, {})[step] = float(value)
            for text in record["violations"]:
                run.violations.setdefault((layer, text.partition("; it was ")[0]), []).append(step)
    run.layers = sorted(layers, key=order)
    run.about = _about([found["all"].get("about") for found in records.values() if "all" in found])
    missing = [layer for layer in run.layers if layer not in records[run.steps[-1]]]
    if missing:
        run.notes.append(f"the last look has nothing from {_names(missing)}")
    return run


def _about(told: list[object]) -> dict[str, str]:
    """What the looks say about themselves, the last one above all."""
    known = [about for about in told if isinstance(about, dict)]
    if not known:
        return {}
    last = {name: str(known[-1].get(name, "unknown")) for name in ("plugin", "megatron")}
    settings = known[-1].get("settings")
    if isinstance(settings, dict):
        last["settings"] = ", ".join(f"{name}={value}" for name, value in settings.items())
    times = [str(about["time"]) for about in known if "time" in about]
    return last | ({"first": min(times), "last": max(times)} if times else {})


def _is_record(record: object) -> bool:
    return (
        isinstance(record, dict)
        and _is_number(record.get("step"), whole=True)
        and (isinstance(record.get("layer"), str) or _is_number(record.get("layer"), whole=True))
        and isinstance(record.get("violations"), list)
        and all(isinstance(text, str) for text in record["violations"])
        and isinstance(record.get("metrics"), dict)
        and all(_is_number(value) for value in record["metrics"].values())
    )


def _is_number(value: object, whole: bool = False) -> bool:
    """What the monitor writes: never NaN or infinity, and no step or layer that a drawing's axis could not hold."""
    if type(value) is int:
        return -_HUGE < value < _HUGE
    return type(value) is float and not whole and math.isfinite(value)


@dataclass(frozen=True)
class Finding:
    """One sentence about a run. `problem`: something is wrong, rather than worth knowing."""

    problem: bool
    text: str
    topic: Topic


def findings(run: Run) -> list[Finding]:
    """What stands out, the worst first."""
    found = [
        Finding(True, _violation(layer, text, steps), "precision") for (layer, text), steps in run.violations.items()
    ]
    found += [Finding(True, text, "values") for text in _not_finite(run)]
    found += [Finding(True, text, "load") for text in _dead(run)]
    found += [Finding(True, text, "precision") for text in _updates(run)]
    found += _choices(run)
    found += [Finding(False, text, "load") for text in _loads(run)]
    found += [Finding(False, text, "precision") for text in [*_biases(run), *_probe(run)]]
    found += [Finding(False, text, "file") for text in run.notes]
    return found


def headline(run: Run, found: list[Finding]) -> list[tuple[State, str, str]]:
    """What the page and the terminal say first: (state, about what, sentence). Precision and load are two matters."""
    problems = [finding for finding in found if finding.problem and finding.topic == "precision"]
    some = _count(len(problems), "problem")
    said: list[tuple[State, str, str]] = [
        ("bad", "Precision", f"{some}, the first: {problems[0].text}.") if problems else _without_a_problem(run)
    ]
    values = [finding for finding in found if finding.topic == "values"]
    if values:
        said.append(("bad", "Values", f"{values[0].text}."))
    return [*said, _evenness(run)]


def _without_a_problem(run: Run) -> tuple[State, str, str]:
    if any(name.startswith(("precision/", "update/", "flips/")) for name in run.values):
        return "good", "Precision", "no problems."
    return "unknown", "Precision", "nothing in this file tells; docs/monitor.md says where nothing is looked at."


def _evenness(run: Run) -> tuple[State, str, str]:
    """Of the last look: layers with idle experts, or whose busiest expert gets twice its share or more."""
    vio, idle, experts = (run.last(f"load/{name}") for name in ("max_vio", "dead_experts", "experts"))
    if not vio:
        return "unknown", "Load", "not counted at the last look; docs/monitor.md says where it is not."
    uneven = [layer for layer in vio if vio[layer] >= UNEVEN or idle.get(layer, 0) > 0]
    if not uneven:
        worst = max(vio, key=lambda layer: vio[layer])
        return "good", "Load", f"even; the busiest expert gets {1 + vio[worst]:.2f} times its share (layer {worst})."
    worst = max(uneven, key=lambda layer: (idle.get(layer, 0), vio[layer]))
    of = f"of {experts[worst]:.0f} experts" if worst in experts else "experts"
    what = (
        f"{idle[worst]:.0f} {of} idle"
        if idle.get(worst, 0)
        else f"the busiest expert gets {1 + vio[worst]:.2f} times its share"
    )
    where = f" in layer {worst}" if len(uneven) > 1 else ""
    return (
        "bad" if any(idle.get(layer, 0) for layer in uneven) else "unknown",
        "Load",
        (f"{_names(uneven)} uneven, {what}{where}."),
    )


def _violation(layer: Layer, text: str, steps: list[int]) -> str:
    return f"layer {layer}: {text}, {_at(steps[0], steps[-1])}"


def _at(first: int, last: int) -> str:
    return f"at step {first}" if first == last else f"at steps {first} to {last}"


def _not_finite(run: Run) -> list[str]:
    """Tensors with NaN or infinite values. Layers that show it at the same looks share a sentence."""
    found: dict[tuple[str, int, int], list[Layer]] = {}
    for metric in run.values:
        for layer in run.layers if metric.startswith(NOT_FINITE) else ():
            steps = [step for step in run.steps if run.values[metric].get(layer, {}).get(step, 0) > 0]
            if steps:
                found.setdefault((metric.removeprefix(NOT_FINITE), steps[0], steps[-1]), []).append(layer)
    ordered = sorted(found.items(), key=lambda item: item[0][1])
    return [f"{_names(layers)}: {name} is not finite, {_at(first, last)}" for (name, first, last), layers in ordered]


def _dead(run: Run) -> list[str]:
    now = {layer: int(number) for layer, number in run.last("load/dead_experts").items() if number > 0}
    worst_first = sorted(now, key=lambda layer: -now[layer])
    sentences = [
        f"layer {layer}: {_count(now[layer], 'idle expert')} since step {_since(run, 'load/dead_experts', layer)}"
        for layer in worst_first[:_LISTED]
    ]
    if len(worst_first) > _LISTED:
        sentences.append(f"idle experts also in {_names(worst_first[_LISTED:])}")
    return sentences


def _since(run: Run, metric: str, layer: Layer) -> int:
    """The first step of the last unbroken series of looks in which `metric` was above 0."""
    since = run.steps[-1]
    for step, value in zip(reversed(run.steps), reversed(run.series(metric, layer)), strict=True):
        if not value > 0:
            break
        since = step
    return since


def _updates(run: Run) -> list[str]:
    sentences = []
    for metric, what in (
        ("update/swallowed", "of the bias updates that were due changed nothing"),
        ("update/reversed", "of the bias updates that were due went the wrong way"),
        ("update/inexact", "of the biases are not what exact arithmetic gives"),
    ):
        worst = {layer: max(by_step.values()) for layer, by_step in run.values.get(metric, {}).items()}
        bad = sorted((layer for layer in worst if worst[layer] > 0), key=lambda layer: -worst[layer])
        for layer in bad[:_LISTED]:
            steps = [step for step, value in run.values[metric][layer].items() if value > 0]
            sentences.append(
                f"layer {layer}: up to {worst[layer]:.1%} {what} ({len(steps)} of {len(run.steps)} looks, first at "
                f"step {steps[0]})"
            )
    return sentences


def _choices(run: Run) -> list[Finding]:
    found = []
    actual = {layer: share for layer, share in run.last("flips/actual").items() if share > 0}
    if actual:
        worst = max(actual, key=lambda layer: actual[layer])
        found.append(
            Finding(
                True,
                f"{_names(list(actual))}: the router chose other experts than fp32 arithmetic does, for up to "
                f"{actual[worst]:.2%} of tokens (layer {worst})",
                "precision",
            )
        )
    parts = []
    for name in ("bf16_weight", "bf16_logits", "bf16_scores", "bf16_bias", "tf32"):
        now = run.last(f"flips/{name}")
        if now:
            worst = max(now, key=lambda layer: now[layer])
            where = f" (layer {worst}: {now[worst]:.2%})" if now[worst] else ""
            arithmetic = name.replace("_", " ").replace("tf32", "TF32")
            parts.append(f"{sum(now.values()) / len(now):.2%} with {arithmetic}{where}")
    if parts:
        text = f"tokens that would go to other experts, mean of layers: {', '.join(parts)}"
        found.append(Finding(False, text, "precision"))
    return found


def _loads(run: Run) -> list[str]:
    now = run.last("load/max_vio")
    if not now:
        return []
    worst = max(now, key=lambda layer: now[layer])
    first = [run.values["load/max_vio"][layer][min(run.values["load/max_vio"][layer])] for layer in now]
    return [
        f"load: the busiest expert gets {1 + now[worst]:.2f} times its fair share in layer {worst}; MaxVio is "
        f"{sum(now.values()) / len(now):.2f} in the mean of layers, {sum(first) / len(first):.2f} at the first look"
    ]


def _biases(run: Run) -> list[str]:
    sentences = []
    for name in ("fp32", "bf16", "fp16"):
        left = run.last(f"bias/steps_to_blind_{name}")
        if not left:
            continue
        worst = min(left, key=lambda layer: left[layer])
        when = f"in about {left[worst]:,.0f} steps at its current drift" if left[worst] else "already"
        if name == "bf16" or left[worst] < 1e6:
            sentences.append(f"layer {worst}: the biases of all experts would be one number in {name} {when}")
    distinct, exact = run.last("bias/distinct_bf16"), run.last("bias/distinct_fp32")
    shared = [layer for layer in distinct if layer in exact and exact[layer] > 1]
    if shared:
        worst = min(shared, key=lambda layer: distinct[layer] / exact[layer])
        sentences.append(
            f"layer {worst}: a cast to bf16 would leave {distinct[worst]:.0f} of {exact[worst]:.0f} distinct biases"
        )
    return sentences


def _probe(run: Run) -> list[str]:
    now = run.last("probe/changed")
    if not now:
        return []
    worst = max(now, key=lambda layer: now[layer])
    return [
        f"{sum(now.values()) / len(now):.1%} of the probe tokens changed experts since the look before (mean of "
        f"layers; layer {worst}: {now[worst]:.1%})"
    ]


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _names(layers: list[Layer]) -> str:
    listed = ", ".join(map(str, layers[:_LISTED]))
    more = f" and {len(layers) - _LISTED} more" if len(layers) > _LISTED else ""
    return f"layer{'' if len(layers) == 1 else 's'} {listed}{more}"
