"""The audit in the terminal: a table, which is plain text where rich is not installed."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Final, TextIO

from megatron_fp32_router.terminal import painted, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from megatron_fp32_router.audit.finding import Audit, Finding
    from megatron_fp32_router.audit.tensors import Checkpoint
    from megatron_fp32_router.pages import State

#: The most rows of a table in the terminal; --json and --html have all.
MAX_ROWS: Final = 400

COLUMNS: Final = ("tensor", "question", "verdict", "answer")

_STYLES: Final = {"good": "green", "problem": "bold red", "unknown": "yellow", "note": "dim"}

#: What pages and terminal.py call a verdict.
STATES: Final[Mapping[str, State]] = {"good": "good", "problem": "bad", "unknown": "unknown", "note": "note"}

_VERDICTS: Final = {
    "good": "good: no problem was found in these routers",
    "problem": "PROBLEM: these routers were damaged, or are kept in a dtype that damages them",
    "unknown": "could not tell",
}

_ORDER: Final = ("problem", "unknown", "good", "note")

#: A layer's number in the name of a tensor: between dots, or at an end.
_LAYER: Final = re.compile(r"(?<![^.])\d{1,9}(?![^.])")


def rows(found: Audit, brief: bool = False) -> list[tuple[str, str, str, str]]:
    """The table, as `COLUMNS` says, problems first. Layers with the same answer share a row.

    `brief`: layers whose answers differ only in their figures share one too, which shows the first layer's.
    """
    groups: dict[tuple[str, str, str, str], list[Finding]] = {}
    for finding in found.findings:
        shape = _LAYER.sub("*", finding.tensor, count=1)
        # Without a layer they are different answers, about the whole checkpoint.
        said = re.sub(r"[\d.,e+-]+", "#", finding.text) if brief and shape != finding.tensor else finding.text
        groups.setdefault((shape, finding.check, finding.verdict, said), []).append(finding)
    table = []
    for (shape, check, verdict, _), findings in groups.items():
        layers = [layer for finding in findings if (layer := _layer(finding.tensor)) >= 0]
        name = findings[0].tensor if len(findings) == 1 else shape.replace("*", _ranges(layers))
        text, alike = findings[0].text, len({finding.text for finding in findings}) == 1
        if not alike:
            text = f"layer {_layer(findings[0].tensor)}: {text}"
        table.append((name or "checkpoint", check, verdict, text))
    return sorted(table, key=lambda row: _ORDER.index(row[2]))


def _layer(name: str) -> int:
    found = _LAYER.search(name)
    return -1 if found is None else int(found[0])


def _ranges(numbers: list[int]) -> str:
    """[3, 4, 5, 7] -> "{3-5,7}"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(f"{a}-{b}" if a != b else str(a) for a, b in runs) + "}"


def summary(found: Audit) -> list[str]:
    """What was read, and the verdict."""
    checkpoint = found.checkpoint
    read = f"read {size(checkpoint.bytes_read)} of {size(checkpoint.bytes_on_disk)}"
    said = [f"{_described(checkpoint)}; {read}"]
    if found.against is not None:
        said.append(f"against {_described(found.against)}")
    said.append(f"verdict: {_VERDICTS[found.verdict]}")
    return said


def _described(checkpoint: Checkpoint) -> str:
    step = "" if checkpoint.iteration is None else f", iteration {checkpoint.iteration:,}"
    return f"{checkpoint.path}: {checkpoint.format}{step}; {len(checkpoint.tensors)} router tensors"


def size(count: int) -> str:
    """Bytes for people: "1.2 GB"."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def show(found: Audit, out: TextIO) -> None:
    """Print table and summary."""
    table = rows(found, brief=True)
    shown = [(printable(name), check, verdict, printable(text)) for name, check, verdict, text in table[:MAX_ROWS]]
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        for name, check, verdict, text in shown:
            print(f"{verdict.upper():8} {name}: {check}: {text}", file=out)
    else:
        grid = Table(show_edge=False)
        for name in COLUMNS:
            grid.add_column(name, overflow="fold")
        for name, check, verdict, text in shown:
            grid.add_row(escape(name), check, f"[{_STYLES[verdict]}]{verdict}[/]", escape(text))
        console = Console(file=out)
        # If rich itself printed to a pipe that was closed, it would end the program with exit code 1.
        with console.capture() as captured:
            console.print(grid)
        out.write(captured.get())
    if len(table) > len(shown):
        print(f"… and {len(table) - len(shown)} more rows: see --json or --html", file=out)
    *read, verdict = summary(found)
    for line in read:
        print(printable(line), file=out)
    print(painted(verdict, STATES[found.verdict]), file=out)


def progress(out: TextIO) -> Callable[[int, str], None]:
    """A function that says how much was read. In a terminal it rewrites one line, in a log it adds one every 10 s.

    It says nothing in the first 2 s.
    """
    start = last = time.monotonic()
    terminal = out.isatty()

    def tell(count: int, what: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - start < 2 or now - last < (0.2 if terminal else 10):
            return
        last = now
        line = f"reading router tensors: {size(count)}, now {printable(what)}"
        out.write(f"\r\x1b[2K{line}" if terminal else f"{line}\n")
        out.flush()

    return tell
