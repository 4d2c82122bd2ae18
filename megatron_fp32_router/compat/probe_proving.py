"""Trying promises one after the other, and noting what of Megatron ran meanwhile."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch

from megatron_fp32_router.lab import Recipe, checkpoint

#: How many steps a training of the probe takes before a save, and after it.
STEPS: Final = 3
RESUMED: Final = f"{STEPS} steps, save, load and {STEPS} more end on the bits of {2 * STEPS}"


class Failed(Exception):
    """A promise does not hold; the text says what was found."""


class LeftOut(Exception):
    """Nothing was tried; the text says why."""


Promise: TypeAlias = Callable[[Recipe], str]


def same(what: str, one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Raise Failed where two snapshots differ; `what` says when they were taken."""
    different = checkpoint.differences(one, other)
    if different:
        raise Failed(f"{what}: {len(different)} of {len(one)} tensors differ, first {different[0]}")


def prove_each(
    promises: dict[str, Promise], recipe: Recipe, arguments: dict[str, Any], *, stop: bool = False
) -> dict[str, Any]:
    """Try promises one after the other.

    Args:
        stop: raise what a promise raises, except Failed and LeftOut, as other ranks may wait for this one. Results from
            before are in the file `arguments["done"]`, one a line.

    Returns:
        `proofs`: [name, holds, detail] of each; holds is None for what was left out. `ran`: [name, line] of every
        function in the files of `arguments["files"]`, by file, that was called in a promise that holds.
    """
    results: list[list[Any]] = []
    ran: dict[str, set[tuple[str, int]]] = {file: set() for file in arguments["files"]}
    called: set[tuple[str, str, int]] = set()

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            code = frame.f_code
            if code.co_filename in ran:
                called.add((code.co_filename, code.co_name, code.co_firstlineno))

    def tell(what: str, text: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            with Path(arguments[what]).open("a", encoding="utf-8") as file:
                file.write(f"{text}\n")

    for name, promise in promises.items():
        tell("progress", name)
        called.clear()
        if ran:
            sys.setprofile(note)  # slows everything down
        try:
            results.append([name, True, promise(recipe)])
        except LeftOut as error:
            results.append([name, None, str(error)])
        except Failed as error:
            results.append([name, False, str(error)])
        except Exception as error:  # a changed Megatron may raise anything, which is reported
            if stop:
                raise
            results.append([name, False, f"{type(error).__name__}: {error}"])
        finally:
            sys.setprofile(None)
        tell("done", json.dumps(results[-1]))
        if results[-1][1]:
            for file, function, line in called:
                ran[file].add((function, line))
    return {"proofs": results, "ran": {file: [list(item) for item in sorted(found)] for file, found in ran.items()}}
