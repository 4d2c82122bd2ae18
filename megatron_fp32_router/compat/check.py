"""`megatron-fp32-router check`: is this Megatron one that the plugin is right for?

Exit codes: 0 it fits, 1 it does not, 2 could not tell or bad input. The static part imports neither torch nor Megatron.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.version import InvalidVersion, Version

from megatron_fp32_router.compat import find
from megatron_fp32_router.compat.check_output import print_report
from megatron_fp32_router.compat.check_report import EXIT_CODES, Report
from megatron_fp32_router.errors import Fp32RouterError
from megatron_fp32_router.patching import accepted as accepting
from megatron_fp32_router.patching.accepted import Accepted
from megatron_fp32_router.patching.fingerprints import known
from megatron_fp32_router.patching.judge import Judge
from megatron_fp32_router.patching.megatron import Megatron
from megatron_fp32_router.patching.record import AREAS, USUAL
from megatron_fp32_router.patching.source import Tree, UnreadableSourceError
from megatron_fp32_router.settings import PREFIX

if TYPE_CHECKING:
    import argparse


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
        "--pin", metavar="VERSION", help="fail unless this version, or this commit of a clone, is found"
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
    print_report(report, "json" if arguments.json else arguments.format)
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
    """Refuse before the probe, which takes a minute, what could not be written after it."""
    if not path.parent.is_dir():
        raise Fp32RouterError(f"{path} cannot be written: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise Fp32RouterError(f"{path} cannot be written: permission denied")


def _accepted_file(arguments: argparse.Namespace) -> Accepted:
    path = _accepted_path(arguments)
    # A file that the user named has to be there, unless it is to be written.
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
        way_out = way_out if asked else f"because it was not asked for; add {areas} to --for"
        if found:
            names = ", ".join(sorted(t.dotted for t in found))
            report.notes.append(f"has drifted and did not run in the probe, {way_out}: {names}")


def _accept(report: Report, arguments: argparse.Namespace) -> None:
    path = _accepted_path(arguments)
    if report.verdict != "fits" or report.probe is None:
        report.notes.append("nothing is accepted: only a passing probe can be recorded")
        return
    # What an earlier file accepts and this probe did not run stays accepted.
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
