"""The step after which a restarted program goes on, if it counts from 1. Imported only if monitor.jsonl exists."""

from __future__ import annotations

import json
from pathlib import Path


def last_step(file: Path) -> int:
    """The step of the last whole line of `file`; 0 when there is none.

    Also 0 when the file cannot be read: sinks.append() then warns.
    """
    try:
        with file.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - 2**20))
            lines = stream.read(2**20).splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue  # the job was killed while it wrote this line
    return 0
