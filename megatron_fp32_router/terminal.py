"""What all commands print with: one prefix for standard error, and colours on a terminal only."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Final

PROGRAM: Final = "megatron-fp32-router"

_COLOURS: Final = {"good": "32", "bad": "1;31", "unknown": "33", "note": "2"}

#: What reads checkpoints and emulates engines; the `audit` extra of pyproject.toml.
AUDIT: Final = ("numpy", "ml_dtypes", "safetensors")


def printable(text: str) -> str:
    """`text` without control characters, which names in a file may hold and a terminal would obey."""
    return "".join(char if char.isprintable() else "?" for char in text)


def tell(command: str, what: str) -> None:
    """Print on standard error what a command is doing, or what is wrong. A message may have several lines."""
    lines = "\n".join(printable(line) for line in what.splitlines())
    print(f"{PROGRAM} {command}: {lines}", file=sys.stderr, flush=True)


def refuse(command: str, why: str) -> int:
    """Print why a command could not do its work, and return the exit code for that."""
    tell(command, why)
    return 2


@contextlib.contextmanager
def repeating(action: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call `action` every so many seconds, in a thread of its own, while this is open."""
    finished = threading.Event()

    def repeat() -> None:
        while not finished.wait(seconds):
            action()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def lacking(name: str | None, *packages: str) -> str:
    """The sentence that a package is missing, and how to install it: by its name, as an index may not have ours."""
    return f"{name} is not installed: {sys.executable} -m pip install {' '.join(packages)}"


def painted(text: str, state: str) -> str:
    """`text` in the colour of a state, where standard output is a terminal and NO_COLOR is not set (no-color.org)."""
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\x1b[{_COLOURS[state]}m{text}\x1b[0m"
