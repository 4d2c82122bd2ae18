"""How `check` prints what it has found out: for a terminal, as JSON, or for GitHub Actions."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

from megatron_fp32_router.compat.check_report import Report
from megatron_fp32_router.compat.show import table
from megatron_fp32_router.patching.record import AREAS
from megatron_fp32_router.terminal import painted, tell

#: How many lines of a diff are shown in a terminal; --json has all of them.
_DIFF_LINES: Final = 40


def print_report(report: Report, form: str) -> None:
    """Print it. `form`: "table", "json" or "github"."""
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
        # In a version that is no known release, no function can be better than "known".
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
