"""Tables: with rich where it is installed, plain otherwise. `check` runs in CI with the core package alone."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table to standard output."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        _plain(header, rows)
        return
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in header:
        made.add_column(name, overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    # In a log file nothing should be cut.
    Console(width=None if sys.stdout.isatty() else 160).print(made)


def _plain(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Columns as wide as they need to be; the last one is broken into lines."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header) - 1)]
    room = max(40, shutil.get_terminal_size((160, 24)).columns - sum(widths) - 2 * len(widths))
    for row in (header, tuple("-" * len(name) for name in header), *rows):
        start = "".join(f"{cell:<{width}}  " for cell, width in zip(row, widths, strict=False))
        lines = textwrap.wrap(row[-1], room) or [""]
        print((start + lines[0]).rstrip())
        for line in lines[1:]:
            print(" " * len(start) + line)
