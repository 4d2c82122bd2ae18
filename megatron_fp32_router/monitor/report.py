"""`report RUN.jsonl`: say what stands out in what the monitor wrote, and draw the page."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Final

from megatron_fp32_router.monitor import page
from megatron_fp32_router.monitor.runs import UnreadableRunError, findings, headline, read
from megatron_fp32_router.terminal import painted, printable, refuse, tell

#: A file larger than this takes more than a moment to read, so it is announced.
_LARGE: Final = 30_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `report`."""
    parser.add_argument("run", metavar="RUN.jsonl", type=Path, help="the monitor's file, or the folder that holds it")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the page; default: beside the file, as .html")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def _refuse(why: str) -> int:
    return refuse("report", why)


def main(arguments: argparse.Namespace) -> int:
    """Do it. 0: the page is written; 2: it could not be."""
    try:
        path: Path = arguments.run
        if path.is_file() and path.stat().st_size > _LARGE:
            tell("report", f"reading {path} ({path.stat().st_size / 1e6:,.0f} MB)")
        run = read(path)
        found = findings(run)
        out: Path = arguments.out or run.path.with_suffix(".html")
        if out.resolve() == run.path.resolve():
            return _refuse(f"{out}: is the run itself, which is not written over; --out FILE names the page")
        # Names in a file may hold halves of characters, which no encoding has.
        out.write_text(page.render(run, found), encoding="utf-8", errors="backslashreplace")
    except (UnreadableRunError, OSError) as error:
        return _refuse(str(error))
    except (ValueError, TypeError, ArithmeticError, LookupError, RecursionError, MemoryError) as error:
        return _refuse(f"{arguments.run}: cannot be drawn: {type(error).__name__}: {str(error)[:200]}")
    if arguments.json:
        summary = {
            "file": str(run.path),
            "page": str(out),
            "first_step": run.steps[0],
            "last_step": run.steps[-1],
            "looks": len(run.steps),
            "layers": run.layers,
            "headline": [{"state": state, "about": about, "text": text} for state, about, text in headline(run, found)],
            "findings": [asdict(finding) for finding in found],
        }
        print(json.dumps(summary, indent=1))
    else:
        for state, about, text in headline(run, found):
            print(painted(printable(f"{about}: {text}"), state))
        for finding in found:
            print(f"{painted('!', 'bad') if finding.problem else ' '} {printable(finding.text)}")
        print(f"page: {printable(str(out))}")
    return 0
