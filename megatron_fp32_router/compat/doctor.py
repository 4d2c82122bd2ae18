"""`megatron-fp32-router doctor`: everything about this environment on one screen.

Exit codes: 0 nothing stands in the way, 1 something does, 2 there is no Megatron to look at (with --device: or no GPU),
or it cannot be read. Neither torch nor Megatron is imported; with --device torch and TransformerEngine are.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from megatron_fp32_router.compat import environment, find
from megatron_fp32_router.compat.show import table
from megatron_fp32_router.errors import Fp32RouterError, SettingsError
from megatron_fp32_router.patching import accepted as accepting
from megatron_fp32_router.patching.judge import Judge, Target
from megatron_fp32_router.patching.record import USUAL, Patch
from megatron_fp32_router.patching.records import PATCHES
from megatron_fp32_router.patching.source import Tree, UnreadableSourceError
from megatron_fp32_router.settings import PREFIX, Settings, from_environment
from megatron_fp32_router.terminal import painted
from megatron_fp32_router.version import __version__

Level: TypeAlias = Literal["ok", "note", "problem", "unknown"]

#: How each level is marked, and painted.
_SIGNS: Final[dict[Level, tuple[str, str]]] = {
    "ok": ("ok", "good"),
    "note": ("--", "note"),
    "problem": ("!!", "bad"),
    "unknown": ("??", "unknown"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report: the state of something, and what to do if it is a problem."""

    level: Level
    about: str
    text: str


@dataclass
class Diagnosis:
    """Everything that `doctor` has found out."""

    findings: list[Finding] = field(default_factory=list)
    #: Each patch, with the state it would have in a program, and a sentence about it.
    patches: list[tuple[Patch, str, str]] = field(default_factory=list)
    megatrons: list[str] = field(default_factory=list)
    version: str | None = None
    #: What --device has measured.
    device: dict[str, Any] | None = None

    def add(self, level: Level, about: str, text: str) -> None:
        """Add a line."""
        self.findings.append(Finding(level, about, text))

    @property
    def code(self) -> int:
        """The exit code."""
        levels = {finding.level for finding in self.findings}
        return 1 if "problem" in levels else 2 if "unknown" in levels else 0

    def to_json(self) -> dict[str, Any]:
        """What --json prints."""
        return {
            "verdict": {0: "good", 1: "problem", 2: "unknown"}[self.code],
            "plugin": {"version": __version__, "path": str(Path(__file__).parents[1])},
            "interpreter": environment.interpreter(),
            "megatron": {"version": self.version, "paths": self.megatrons},
            "libraries": [vars(library) for library in environment.libraries()],
            "findings": [vars(finding) for finding in self.findings],
            "device": self.device,
            "patches": [
                {
                    "id": patch.id,
                    "target": patch.target,
                    "state": state,
                    "detail": detail,
                    "why": patch.why,
                    "issue": patch.issue,
                    "remove_when": patch.remove_when,
                }
                for patch, state, detail in self.patches
            ],
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("--megatron", metavar="PATH", help="look at this Megatron instead of the installed one")
    parser.add_argument("--json", action="store_true", help="print one JSON object, to be attached to an issue")
    parser.add_argument("--device", action="store_true", help="measure the router's products on this GPU (a minute)")
    parser.add_argument(
        "--shape",
        type=_shape,
        nargs="+",
        default=[],
        metavar="TxHxE",
        help="with --device: tokens of a micro-batch, hidden size and experts of your routers (default 4096x7168x256)",
    )
    parser.add_argument("--verbose", action="store_true", help="list every patch, and not only those that do not fit")


def _shape(text: str) -> tuple[int, int, int]:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected TOKENSxHIDDENxEXPERTS, such as 4096x7168x256, found {text!r}")
    tokens, hidden, experts = map(int, text.split("x"))
    return tokens, hidden, experts


def main(arguments: argparse.Namespace) -> int:
    """Look, print, and return the exit code."""
    found = Diagnosis()
    looks: dict[str, Callable[[], None]] = {
        "python": lambda: _look_at_interpreter(found),
        "start-up file": lambda: _look_at_activation(found),
        "libraries": lambda: _look_at_libraries(found),
        "Megatron": lambda: _look_at_megatron(found, arguments.megatron),
    }
    if arguments.device or arguments.shape:
        looks["device"] = lambda: _look_at_device(found, arguments.shape)
    for about, look in looks.items():
        try:
            look()
        except OSError as error:  # for example a folder on the path that may not be read; the rest is still shown
            found.add("unknown", about, f"cannot be looked at: {error}")
    if arguments.json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        _print(found, verbose=arguments.verbose)
    return found.code


def _look_at_interpreter(found: Diagnosis) -> None:
    python = environment.interpreter()
    supported = sys.version_info >= (3, 10)
    flags = f", run with {python['flags']}" if python["flags"] else ""
    text = f"{python['version']} ({python['executable']}){flags}"
    found.add("ok" if supported else "problem", "python", text)
    found.add("ok", "plugin", f"{__version__}, {environment.installation()} ({Path(__file__).parents[1]})")
    for version, folder in environment.other_copies():
        found.add("note", "plugin", f"another copy on the path, {version}, which does not run: {folder}")


def _look_at_activation(found: Diagnosis) -> None:
    known_variables, wrong = environment.variables()
    for name, value in known_variables:
        found.add("ok", "variable", f"{name}={value}")
    for sentence in wrong:
        found.add("problem", "variable", sentence)
    switch, (read, why) = environment.switched(), environment.startup()
    if read:
        found.add("ok", "start-up file", why)
    else:
        found.add("problem" if switch else "note", "start-up file", f"{why}. Instead: {environment.remedy()}")
    if switch is False:
        found.add("problem", "switch", f"{PREFIX}=0 turns the plugin off, whatever else asks for it")
    elif switch is None and read:
        found.add("note", "switch", f"{PREFIX} is not set: the plugin is on only in programs that import it")


def _look_at_libraries(found: Diagnosis) -> None:
    for library in environment.libraries():
        text = f"{library.version or 'version unknown'} ({library.path})"
        if library.name == "wrapt" and library.version is not None:
            fits = environment.WRAPT.contains(library.version, prereleases=True)
            install = f"{sys.executable} -m pip install 'wrapt>=1.17,<3'"
            needed = "" if fits else f"; {environment.WRAPT} is needed: {install}"
            found.add("ok" if fits else "problem", library.name, text + needed)
        elif library.path is None and library.name == "TransformerEngine":
            found.add("note", library.name, "not here")
        elif library.path is None:
            hint = f"{sys.executable} -m pip install {library.name}"
            found.add("problem", library.name, f"not here, and nothing trains without it: {hint}")
        else:
            found.add("ok", library.name, text)


def _look_at_megatron(found: Diagnosis, given: str | None) -> None:
    installed = find.installed()
    for patcher, place in environment.patchers():
        found.add("note", "other patcher", f"{patcher.name} ({place}): {patcher.displaces}")
    try:
        root = find.root(given)
        megatron = find.megatron(root)
    except Fp32RouterError as error:
        found.add("unknown", "Megatron", str(error))
        return
    found.version = str(megatron.version)
    found.megatrons = [str(root)] if given else [str(path) for path in installed]
    found.add("ok", "Megatron", f"{megatron} ({root})")
    for other in installed[1:] if given is None else []:
        found.add("note", "Megatron", f"another one on the path, which an import does not take: {other}")
    accepted = _accepted(found)
    try:
        judge = Judge(Tree(root), megatron, accepted.targets)
        targets = judge.all()
    except (Fp32RouterError, UnreadableSourceError) as error:
        found.add("unknown", "Megatron", str(error))
        return
    _look_at_patches(found, judge, targets)
    if judge.tree.has("megatron.core.transformer.module") and _marks(judge):
        found.add("note", "upstream", "this Megatron has mark_keep_in_fp32, which its router does not use yet (#5929)")


def _look_at_device(found: Diagnosis, shapes: list[tuple[int, int, int]]) -> None:
    try:
        from megatron_fp32_router.compat import device
    except ImportError as error:
        found.add("unknown", "device", f"torch is needed to measure it: {error}")
        return
    try:
        found.device = device.look(found.add, shapes, _settings().products)
    except RuntimeError as error:  # out of memory, say
        found.add("unknown", "device", f"could not be measured: {str(error).splitlines()[0]}")


def _accepted(found: Diagnosis) -> accepting.Accepted:
    """The changes that a training would accept: those in the file of the variable. An unreadable one would stop it."""
    path = _settings().accepted
    if not path:
        return accepting.Accepted()
    try:
        accepted = accepting.read(Path(path))
    except SettingsError as error:
        found.add("problem", "accepted file", f"{error}; a training would stop there")
        return accepting.Accepted()
    if accepted.why_not:
        found.add("problem", "accepted file", accepted.why_not)
    else:
        found.add("ok", "accepted file", f"{accepted.path}: {len(accepted.targets)} accepted changes")
    return accepted


def _settings() -> Settings:
    """What the environment asks for; the defaults where it has a value that is not accepted, which is a finding."""
    try:
        return from_environment()
    except SettingsError:
        return Settings()


def _marks(judge: Judge) -> bool:
    return judge.tree.body("megatron.core.transformer.module:mark_keep_in_fp32").digest is not None


def _look_at_patches(found: Diagnosis, judge: Judge, targets: list[Target]) -> None:
    """The state that each patch would have in a program that runs with this Megatron."""
    off = environment.switched() is False
    monitored = bool(_settings().monitor)
    for patch in PATCHES:
        if patch.monitor and not monitored:
            continue
        own = [target for target in targets if patch.id in target.patches]
        unfit = [target for target in own if not target.fits]
        needless = judge.needless(patch)
        if off:
            found.patches.append((patch, "off", ""))
        elif needless is not None and not unfit:
            state = "n/a" if needless == "absent" else "native"
            found.patches.append((patch, state, patch.why_needless(needless)))
        elif unfit:
            worst = unfit[0]
            found.patches.append((patch, "drifted", f"{worst.dotted} {_what(worst)}; {worst.file}:{worst.line}"))
        else:
            found.patches.append((patch, "applied", ""))
    drifted = [patch for patch, state, _ in found.patches if state == "drifted"]
    counts = Counter(state for _, state, _ in found.patches)
    told = ", ".join(f"{number} {state}" for state, number in sorted(counts.items()))
    if any(patch.area in USUAL for patch in drifted):
        tried = ", `check --accept` tries it" if all(t.patchable for t in targets if not t.fits) else ""
        found.add("problem", "patches", f"{told}: `check` shows what has changed{tried}")
    else:
        found.add("ok", "patches", f"would be: {told}")
        if drifted:
            areas = ", ".join(sorted({patch.area for patch in drifted}))
            found.add("note", "patches", f"changed, so refused when used: {areas}; `check --for all` shows how")


def _measured(device: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for row in device["shapes"]:
        for name, way in row["ways"].items():
            shape = f"{row['tokens']} x {row['hidden']} x {row['experts']}"
            times = (
                "" if way[f"{part}_ms"] is None else f"{way[f'{part}_ms']:.3g}" for part in ("forward", "backward")
            )
            means = (f"{way['errors'][p]['mean']:.1e}" for p in way["errors"])
            rows.append((shape, name, *times, *means, f"{way['other_experts']:.2%}"))
    return rows


def _what(target: Target) -> str:
    return "does not exist" if target.state == "missing" else "has changed"


def _brief(findings: list[Finding]) -> list[Finding]:
    """The same, with all good libraries in one line and without their folders, to fit one screen."""
    names = {library.name for library in environment.libraries()}
    good = [finding for finding in findings if finding.about in names and finding.level == "ok"]
    if not good:
        return findings
    text = ", ".join(f"{finding.about} {finding.text.partition(' (')[0]}" for finding in good)
    at = findings.index(good[0])
    rest = [finding for finding in findings if finding not in good]
    return [*rest[:at], Finding("ok", "libraries", f"{text} (--verbose: where)"), *rest[at:]]


def _print(found: Diagnosis, *, verbose: bool) -> None:
    listed = found.findings if verbose else _brief(found.findings)
    width = max(len(finding.about) for finding in listed)
    for finding in listed:
        print(f"{painted(*_SIGNS[finding.level])}  {finding.about:<{width}}  {finding.text}")
    shown = [entry for entry in found.patches if verbose or entry[1] == "drifted"]
    if shown:
        table(
            ("patch", "state", "detail"), [(patch.id, state, detail or patch.target) for patch, state, detail in shown]
        )
    if found.device is not None:
        print(
            "Mean errors, relative to the sum of the absolute terms; tokens whose top-8 experts are not those of fp64:"
        )
        head = (
            "tokens x hidden x experts",
            "products",
            "forward ms",
            "backward ms",
            "logits",
            "dweight",
            "dinput",
            "tokens",
        )
        table(head, _measured(found.device))
    problems = [finding for finding in found.findings if finding.level == "problem"]
    if problems:
        print(painted(f"{len(problems)} problem{'s' if len(problems) != 1 else ''}, marked with !!", "bad"))
    elif found.code == 2:
        seen = "Not everything" if found.patches else "No Megatron"
        print(painted(f"{seen} could be looked at: see ??", "unknown"))
    else:
        print(painted("Nothing stands in the way of the plugin.", "good"))
