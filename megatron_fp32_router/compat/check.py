"""`megatron-fp32-router check`: is this Megatron one that the plugin is right for?

Exit codes: 0 it fits, 1 it does not, 2 could not tell or bad input. The static part imports neither torch nor Megatron.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from packaging.version import InvalidVersion, Version

from megatron_fp32_router.compat import find
from megatron_fp32_router.compat.show import table
from megatron_fp32_router.errors import Fp32RouterError
from megatron_fp32_router.patching import accepted as accepting
from megatron_fp32_router.patching.accepted import Accepted
from megatron_fp32_router.patching.fingerprints import known
from megatron_fp32_router.patching.judge import Judge, Target
from megatron_fp32_router.patching.megatron import Megatron
from megatron_fp32_router.patching.record import AREAS, USUAL
from megatron_fp32_router.patching.records import PATCHES
from megatron_fp32_router.patching.source import Tree, UnreadableSourceError
from megatron_fp32_router.settings import PREFIX
from megatron_fp32_router.terminal import painted, tell
from megatron_fp32_router.version import __version__

if TYPE_CHECKING:
    import argparse

    from megatron_fp32_router.compat.probe import Outcome

Verdict: TypeAlias = Literal["fits", "does not fit", "unknown"]

EXIT_CODES: Final[dict[Verdict, int]] = {"fits": 0, "does not fit": 1, "unknown": 2}

#: So many lines of a diff are shown in a terminal; --json has all of them.
_DIFF_LINES: Final = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument(
        "--megatron",
        metavar="PATH",
        help="the folder that holds megatron/: a checkout, a fork, an unpacked wheel (default: the installed one)",
    )
    parser.add_argument(
        "--for",
        dest="areas",
        metavar="AREA,…",
        default=",".join(USUAL),
        help=f"what the job uses, or 'all': {', '.join(AREAS)} (default: {', '.join(USUAL)})",
    )
    parser.add_argument(
        "--pin", metavar="VERSION", help="fail when another version, or another commit of a clone, than this is found"
    )
    parser.add_argument(
        "--probe", action="store_true", help="also train the tiny laboratory model on it, as --for says, and compare"
    )
    parser.add_argument(
        "--accept",
        metavar="FILE",
        nargs="?",
        const="",
        help="probe, and when that passes record what has drifted, for `check` and for training "
        f"(default FILE: ${PREFIX}_ACCEPTED, or {accepting.DEFAULT} here)",
    )
    parser.add_argument(
        "--unproven",
        action="store_true",
        help="with --probe or --accept: you have read the diffs of what the probe does not run, and vouch for them",
    )
    parser.add_argument(
        "--transformer-engine",
        metavar="FOLDER",
        default="",
        help="with --probe or --accept: its wheel, unpacked, to try the precision-aware optimizer with",
    )
    parser.set_defaults(usage_error=parser.error)
    parser.add_argument("--json", action="store_true", help="print one JSON object; the same as --format json")
    parser.add_argument("--format", choices=("table", "json", "github"), default="table", help="how to print it")


@dataclass
class Report:
    """Everything that `check` has found out."""

    root: str | None
    version: str | None = None
    known_release: bool = False
    targets: list[Target] = field(default_factory=list)
    #: What the job uses, of patching.record.AREAS.
    areas: tuple[str, ...] = USUAL
    #: Sentences that stand against it, beside the targets that do not fit.
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    probe: Outcome | None = None
    #: Whether the user vouches for what the probe did not run.
    vouched: bool = False
    unknown: str = ""

    @property
    def unfit(self) -> list[Target]:
        """The targets that the job uses and that do not fit, except those that a passing probe has cleared."""
        return [t for t in self.targets if not t.fits and t not in self.proven and t.areas & set(self.areas)]

    def area(self, name: str) -> str:
        """A word about an area: whether it fits, or what comes of it."""
        drifted = [t for t in self.targets if not t.fits and name in t.areas]
        if all(t in self.proven for t in drifted):
            return "fits, proven by the probe" if drifted and not self.vouched else "fits"
        if name == "router":
            return "does not fit"
        stops = any(patch.essential for patch in PATCHES if patch.area == name)
        return "drifted, refused when used" if stops else "drifted, left out: slower"

    @property
    def proven(self) -> list[Target]:
        """What has drifted and ran in a probe that passed, or was vouched for."""
        if self.probe is None or not self.probe.passed:
            return []
        unproven = () if self.vouched else self.probe.unproven
        return [t for t in self.targets if t.state == "drifted" and t.name not in unproven]

    @property
    def verdict(self) -> Verdict:
        """The one word."""
        if self.unknown:
            return "unknown"
        failed = self.probe is not None and not self.probe.passed
        return "does not fit" if self.unfit or self.problems or failed else "fits"

    def to_json(self) -> dict[str, Any]:
        """What --json prints."""
        return {
            "megatron": {"path": self.root, "version": self.version},
            "plugin": __version__,
            "verdict": self.verdict,
            "reason": self.unknown or "; ".join(self.problems),
            "notes": self.notes,
            "areas": {name: self.area(name) for name in AREAS} if self.targets else {},
            "for": list(self.areas),
            "targets": [
                {
                    "target": t.dotted,
                    "state": t.state,
                    "detail": t.detail,
                    "patches": list(t.patches),
                    "file": t.file,
                    "line": t.line,
                    "accepted": t.accepted,
                    "diff": t.diff,
                }
                for t in self.targets
            ],
            "probe": None
            if self.probe is None
            else [{"name": p.name, "holds": p.holds, "detail": p.detail} for p in self.probe.proofs],
        }


def main(arguments: argparse.Namespace) -> int:
    """Check, print, and return the exit code."""
    if arguments.unproven and not arguments.probe and arguments.accept is None:
        arguments.usage_error("--unproven needs --probe or --accept: it is about what a probe did not run")
    report = Report(arguments.megatron)
    try:
        report.areas = _areas(arguments.areas)
        if arguments.accept is not None:
            _require_writable(_accepted_path(arguments))
        _static(report, arguments)
        if (arguments.probe or arguments.accept is not None) and not report.unknown:
            _probe(report, arguments)
        if arguments.accept is not None and not report.unknown:
            _accept(report, arguments)
    except (Fp32RouterError, UnreadableSourceError, OSError) as error:
        report.unknown = str(error)
    _print(report, "json" if arguments.json else arguments.format)
    return EXIT_CODES[report.verdict]


def _static(report: Report, arguments: argparse.Namespace) -> None:
    root = find.root(arguments.megatron)
    report.root = str(root)
    megatron = find.megatron(root)
    report.version = str(megatron.version)
    if arguments.pin is not None:
        _compare_pin(report, arguments.pin, megatron)
    others = find.installed()[1:] if arguments.megatron is None else []
    if others:
        report.notes.append(f"an import takes this Megatron, and not the one in {', '.join(map(str, others))}")
    oldest, newest = known().releases[0], known().releases[-1]
    if megatron.version is not None and megatron.version.release < Version(oldest).release[:2]:
        report.problems.append(_older(f"{megatron.version} is", oldest))
        return
    accepted = _accepted_file(arguments)
    if accepted.why_not:
        report.notes.append(accepted.why_not)
    judge = Judge(Tree(root), megatron, accepted.targets)
    if judge.has_no_expert_bias():
        report.problems.append(_older(f"it says {megatron.version}, and its router has no expert_bias: it is", oldest))
        return
    report.targets = judge.all()
    for file in judge.cut_short(report.targets):
        report.notes.append(f"{root / file} ends too early: a truncated checkout? Check it out again")
    report.known_release = judge.index is not None
    if not report.known_release:
        report.notes.append(
            f"{megatron.version} is no release that this version of the plugin knows (it knows {oldest} to {newest}); "
            "its functions are compared with those of all known releases, and of commits between them"
        )
    lie, commit = judge.another_release(), judge.router_commit()
    if lie is not None:
        report.notes.append(f"it calls itself {megatron.version}, and more of its functions are those of {lie}")
    if commit:
        report.notes.append(f"it says {megatron.version}; its router is that of {commit}")
    if any(target.accepted for target in report.targets):
        report.notes.append(f"accepted drifts are taken from {accepted.path}")


def _older(what: str, oldest: str) -> str:
    return f"{what} older than {oldest}, the first that the plugin is for; update Megatron, or train without the plugin"


def _areas(given: str) -> tuple[str, ...]:
    """What --for says.

    Raises:
        Fp32RouterError: an unknown area.
    """
    if given == "all":
        return tuple(AREAS)
    areas = tuple(name.strip() for name in given.split(","))
    unknown = [name for name in areas if name not in AREAS]
    if unknown:
        raise Fp32RouterError(f"--for {', '.join(unknown)}: no such area; there are {', '.join(AREAS)}, and all")
    return areas


def _compare_pin(report: Report, pin: str, megatron: Megatron) -> None:
    if re.fullmatch(r"[0-9a-f]{7,40}", pin):
        found = find.commit(Path(str(report.root)))
        if not found.startswith(pin):
            report.problems.append(f"--pin asks for commit {pin}; found {found}")
        return
    try:
        wanted = Version(pin)
    except InvalidVersion:
        raise Fp32RouterError(
            f"--pin {pin}: not a version, and no commit; expected for example 0.16.1, 0.17.0rc0 or 55ac7082"
        ) from None
    if megatron.version != wanted:
        report.problems.append(f"--pin asks for {wanted}; found {megatron.version}")


def _accepted_path(arguments: argparse.Namespace) -> Path:
    return Path(arguments.accept or os.environ.get(f"{PREFIX}_ACCEPTED", "").strip() or accepting.DEFAULT)


def _require_writable(path: Path) -> None:
    """The probe takes many seconds: what cannot be written after it is said before it."""
    if not path.parent.is_dir():
        raise Fp32RouterError(f"{path} cannot be written: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise Fp32RouterError(f"{path} cannot be written: permission denied")


def _accepted_file(arguments: argparse.Namespace) -> Accepted:
    path = _accepted_path(arguments)
    # A file that somebody named has to be there, except the one that is to be written.
    if not path.exists() and (arguments.accept is not None or str(path) == accepting.DEFAULT):
        return Accepted()
    return accepting.read(path)


def _probe(report: Report, arguments: argparse.Namespace) -> None:
    from megatron_fp32_router.compat import probe

    assert report.root is not None
    report.vouched = arguments.unproven
    hopeless = [t.dotted for t in report.unfit if not t.patchable]
    if hopeless:
        report.notes.append(f"not probed: {', '.join(hopeless)} cannot be patched")
        return
    engine = arguments.transformer_engine
    if engine and not (Path(engine) / "transformer_engine").is_dir():
        raise Fp32RouterError(f"--transformer-engine {engine}: there is no folder transformer_engine in it")
    report.probe = probe.run(
        Path(report.root), report.targets, str(report.version), report.areas, transformer_engine=engine
    )
    report.notes.append(f"the probe took {report.probe.seconds:.0f} s")
    unproven = [t for t in report.targets if t.name in report.probe.unproven and not t.accepted]
    for asked in (True, False):
        found = [t for t in unproven if bool(t.areas & set(report.areas)) == asked]
        areas = ",".join(sorted({area for t in found for area in t.areas}))
        way_out = "which you vouch for" if report.vouched else "read the diff; --unproven vouches for it"
        way_out = way_out if asked else f"for it was not asked; add {areas} to --for"
        if found:
            names = ", ".join(sorted(t.dotted for t in found))
            report.notes.append(f"has drifted and did not run in the probe, {way_out}: {names}")


def _accept(report: Report, arguments: argparse.Namespace) -> None:
    path = _accepted_path(arguments)
    if report.verdict != "fits" or report.probe is None:
        report.notes.append("nothing is accepted: only a passing probe can be recorded")
        return
    # What an earlier file accepts, and this probe did not run, holds as it did.
    accepted = [target for target in report.targets if target.accepted or target in report.proven]
    if not accepted:
        report.notes.append("nothing has drifted, so there is nothing to accept, and no file is needed")
        return
    proofs: Mapping[str, str] = {proof.name: proof.detail for proof in report.probe.proofs}
    try:
        accepting.write(path, str(report.version), accepted, proofs)
    except OSError as error:
        raise Fp32RouterError(f"{path} cannot be written: {error.strerror or error}") from error
    report.notes.append(f"written: {path}. Commit it; for training set {PREFIX}_ACCEPTED={path}")


# Printing -------------------------------------------------------------------------------------------------------


def _print(report: Report, form: str) -> None:
    if report.unknown:
        tell("check", report.unknown)
    if form == "json":
        print(json.dumps(report.to_json(), indent=1))
    elif form == "github":
        _print_annotations(report)
    elif not report.unknown:
        _print_table(report)


def _summary(report: Report) -> str:
    counts = ", ".join(
        f"{number} {state}"
        for state in ("match", "known", "drifted", "missing")
        if (number := sum(target.state == state for target in report.targets))
    )
    what = f"Megatron-Core {report.version}: " if report.version else ""
    if not report.targets:
        return f"{what}{report.verdict}."
    left_out = [name for name in AREAS if name not in report.areas]
    asked = [*report.areas, *(name for name in left_out if not report.area(name).startswith("fits"))]
    areas = "; ".join(f"{name}: {report.area(name)}" for name in asked)
    areas += f". Not asked for: {', '.join(left_out)}" if left_out else ""
    return f"{what}{report.verdict}. {areas}. {len(report.targets)} targets: {counts}."


def _print_table(report: Report) -> None:
    rows = [
        ("accepted" if t.accepted else t.state, t.dotted.removeprefix("megatron."), t.detail)
        for t in report.targets
        # Of a version that is no known release, nothing better than "known" can be said of any function.
        if t.state not in ("match", "known") or (t.state == "known" and report.known_release)
    ]
    print(report.root)
    if rows:
        table(("state", "target", "detail"), rows)
    for t in report.targets:
        if t.state == "drifted" and not t.accepted:
            print(f"\n{t.dotted} ({', '.join(t.patches)}), {t.file}:{t.line}")
            lines = t.diff.splitlines()
            print("\n".join(lines[:_DIFF_LINES]))
            if len(lines) > _DIFF_LINES:
                print(f"… {len(lines) - _DIFF_LINES} more lines with --json")
    if report.probe is not None:
        words = {True: "yes", False: "NO", None: "left out"}
        tried = [(p.name, words[p.holds], p.detail) for p in report.probe.proofs]
        table(("probe", "holds", "detail"), tried)
    for sentence in (*report.problems, *report.notes):
        print(f"- {sentence}")
    print(painted(_summary(report), {"fits": "good", "does not fit": "bad", "unknown": "unknown"}[report.verdict]))
    if report.unfit and report.probe is None and all(t.patchable for t in report.unfit):
        print("What has drifted may be harmless: `check --accept` trains on this tree and records it if it is.")


def _print_annotations(report: Report) -> None:
    """Workflow commands of GitHub Actions: https://docs.github.com/actions/reference/workflow-commands"""
    if report.unknown:
        print(f"::error title=megatron-fp32-router::{_escaped(report.unknown)}")
        return
    for t in report.targets:
        if t.state in ("drifted", "missing"):
            level = "error" if t in report.unfit else "notice"
            place = _property(_relative(Path(str(report.root)) / t.file))
            text = f"{t.dotted} has {t.state}: {t.detail}" if t.state == "drifted" else f"{t.dotted} {t.detail}"
            text += f" (patches {', '.join(t.patches)})\n{t.diff}"
            print(f"::{level} file={place},line={max(t.line, 1)},title=megatron-fp32-router::{_escaped(text.rstrip())}")
    for proof in report.probe.proofs if report.probe is not None else ():
        if proof.holds is False:
            print(f"::error title=megatron-fp32-router::{_escaped(f'probe {proof.name}: {proof.detail}')}")
    for sentence in report.problems:
        print(f"::error title=megatron-fp32-router::{_escaped(sentence)}")
    print(f"::notice title=megatron-fp32-router::{_escaped(' '.join([_summary(report), *report.notes]))}")


def _relative(path: Path) -> str:
    base = Path(os.environ.get("GITHUB_WORKSPACE") or Path.cwd())
    try:
        return str(path.resolve().relative_to(base.resolve()))
    except ValueError:
        return str(path)  # outside the repository: shown as it is


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _escaped(text).replace(":", "%3A").replace(",", "%2C")
