"""All patch records: the `PATCHES` of every record.py in a folder of the package.

A mechanism goes by deleting its folder; nothing lists them.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from importlib import import_module
from typing import Final

import megatron_fp32_router
from megatron_fp32_router.patching.record import AREAS, Patch


def _modules(paths: list[str], package: str) -> Iterator[str]:
    """The dotted names of all record modules below a package. No package is imported for it."""
    for _, name, is_package in pkgutil.iter_modules(paths):
        if is_package:
            yield from _modules([f"{path}/{name}" for path in paths], f"{package}.{name}")
        elif name == "record" and not package.endswith(".patching"):
            yield f"{package}.{name}"


def _discovered() -> Iterator[Patch]:
    for module in _modules(list(megatron_fp32_router.__path__), megatron_fp32_router.__name__):
        yield from import_module(module).PATCHES


#: In the order in which they are put in place, that of AREAS: of two with one target, the later one is the outer one.
PATCHES: Final = tuple(sorted(_discovered(), key=lambda patch: list(AREAS).index(patch.area)))
