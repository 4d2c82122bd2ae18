"""Which Megatron is this: where it lies and what version it is.

The version is read from `package_info.py` beside the module that the import system found, by AST: importing that
file runs git in a subprocess (0.19 and later), and package metadata can belong to another copy on the path.
"""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from packaging.version import Version


@dataclass(frozen=True)
class Megatron:
    """A megatron-core tree.

    Attributes:
        path: the folder `megatron/core`, or None when it cannot be found.
        version: its version, or None when `package_info.py` does not say.
    """

    path: Path | None
    version: Version | None

    def __str__(self) -> str:
        return f"Megatron-Core {self.version or 'of unknown version'}"


def _constant(tree: ast.Module, name: str) -> object:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            for target in node.targets:
                if isinstance(target, ast.Name) and target.id == name:
                    return node.value.value
    return None


def read_version(package_info: Path) -> Version | None:
    """The version that a `package_info.py` spells as MAJOR, MINOR, PATCH, PRE_RELEASE; None if it does not."""
    try:
        tree = ast.parse(package_info.read_text(encoding="utf-8"))
        numbers = [_constant(tree, name) for name in ("MAJOR", "MINOR", "PATCH")]
        if not all(isinstance(number, int) for number in numbers):
            return None
        return Version(".".join(map(str, numbers)) + str(_constant(tree, "PRE_RELEASE") or ""))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        # Told to the user as "of unknown version" in every message. The parser raises each of these: ValueError for
        # zero bytes, the last two for expressions that are nested too deeply. ValueError is also what is no version, or
        # a number with too many digits.
        return None


def of_module(module: ModuleType) -> Megatron:
    """The Megatron that `module` (some `megatron.core.…` or `megatron.legacy.…`) belongs to."""
    file = getattr(module, "__file__", None)
    return Megatron(None, None) if file is None else _tree_around(file)


@functools.cache
def _tree_around(file: str) -> Megatron:
    """Cached: status() asks for each patch, and the Megatron that a process has imported stays the same."""
    for parent in Path(file).resolve().parents:
        if parent.name == "megatron":
            core = parent / "core"
            return Megatron(core, read_version(core / "package_info.py"))
    return Megatron(None, None)
