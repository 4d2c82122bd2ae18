"""A Megatron's source files, read and not imported: which bodies do the targets have in this tree?"""

from __future__ import annotations

import ast
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_fp32_router.patching import canonical


class UnreadableSourceError(Exception):
    """A file of the tree cannot be read or parsed. The text names it and says what to do; nothing can be judged."""


@dataclass(frozen=True)
class Body:
    """What a tree defines under one name.

    Attributes:
        digest: its fingerprint, or None when there is no such definition.
        module: the normalised definition, None when there is none.
        line: where it stands in its file, 0 when there is none.
        span: of a function, its first and last line there, decorators included; otherwise (0, 0).
    """

    digest: str | None
    module: ast.Module | None = None
    line: int = 0
    span: tuple[int, int] = (0, 0)


@dataclass
class Tree:
    """The folder that holds `megatron/`, and what has been read of it."""

    root: Path
    _files: dict[str, ast.Module] = field(default_factory=dict)
    _bodies: dict[str, Body] = field(default_factory=dict)

    def file_of(self, module: str) -> str:
        """The path below the root of the file of a module or package; of a module where neither is there.

        Raises:
            UnreadableSourceError: the file system does not say whether it is there.
        """
        path = module.replace(".", "/")
        package = f"{path}/__init__.py"
        return package if _is_file(self.root / package) else f"{path}.py"

    def has(self, module: str) -> bool:
        """Whether the tree has that module at all."""
        return _is_file(self.root / self.file_of(module))

    def body(self, target: str) -> Body:
        """What the tree defines as `target` (`module:path`).

        Raises:
            UnreadableSourceError: the file cannot be read or parsed.
        """
        if target not in self._bodies:
            module, _, path = target.partition(":")
            home = f"{module}.__init__" if self.file_of(module).endswith("__init__.py") else module
            parsed = self.parsed(module)
            with self.not_too_deep(target):
                self._bodies[target] = _body(canonical.definitions(parsed, home, path))
        return self._bodies[target]

    def holds(self, fact: str, module: str) -> bool:
        """Whether a fact about the source is true: `PATH uses NAME`, `PATH lacks NAME` or `no PATH`.

        A name is used where a variable, an attribute, a parameter or a string is called that. What is not there uses
        nothing. PATH is one of `module`'s, or `other.module:PATH`.

        Raises:
            UnreadableSourceError: the file cannot be read or parsed.
        """
        path, verb, name = ("", "no", fact[3:]) if fact.startswith("no ") else fact.split()
        target = path or name
        target = target if ":" in target else f"{module}:{target}"
        found = self.body(target).module if self.has(target.partition(":")[0]) else None
        if verb == "no":
            return found is None
        used = found is not None and any(name in _names(node) for node in ast.walk(found))
        return used == (verb == "uses")

    @contextlib.contextmanager
    def not_too_deep(self, target: str) -> Iterator[None]:
        """For code that walks through syntax trees: Python parses sources that are nested too deeply to be walked.

        Raises:
            UnreadableSourceError: the source is nested too deeply.
        """
        module, _, path = target.partition(":")
        try:
            yield
        except RecursionError:
            file = self.root / self.file_of(module)
            raise UnreadableSourceError(f"{file}: something is nested too deeply to compare {path}") from None

    def parsed(self, module: str) -> ast.Module:
        """A module's syntax tree.

        Raises:
            UnreadableSourceError: the file cannot be read or parsed.
        """
        if module not in self._files:
            path = self.root / self.file_of(module)
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                raise UnreadableSourceError(f"{path} is missing: a truncated or partial checkout?") from None
            except OSError as error:
                raise UnreadableSourceError(f"{path}: {error.strerror or error}") from error
            self._files[module] = parse(path, content)
        return self._files[module]


def _names(node: ast.AST) -> tuple[object, ...]:
    """What a node of a syntax tree calls by name."""
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute):
        return (node.attr,)
    if isinstance(node, ast.arg | ast.keyword):
        return (node.arg,)
    return (node.value,) if isinstance(node, ast.Constant) else ()


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise UnreadableSourceError(f"{path}: {error.strerror or error}") from error


def _body(found: list[ast.stmt]) -> Body:
    if not found:
        return Body(None)
    line, span = found[0].lineno, (0, 0)
    functions = [node for part in found for node in ast.walk(part) if isinstance(node, canonical.FUNCTIONS)]
    if functions:
        # Decorators belong to it. What rebinds the name further down does not.
        first = min(node.lineno for node in ast.walk(found[0]) if hasattr(node, "lineno"))
        span = (first, max(node.end_lineno or node.lineno for node in functions))
    normalised = canonical.normalised(found)
    return Body(canonical.digest(normalised), normalised, line, span)


def parse(path: Path, content: bytes) -> ast.Module:
    """The syntax tree of a file.

    Raises:
        UnreadableSourceError: it is no Python source.
    """
    if not content.strip():
        raise UnreadableSourceError(f"{path} is empty: a truncated checkout?")
    try:
        return ast.parse(content)
    except SyntaxError as error:
        running = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise UnreadableSourceError(
            f"{path}, line {error.lineno}: {error.msg}; a truncated checkout, or written for "
            f"a newer Python than {running}?"
        ) from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise UnreadableSourceError(f"{path} is not Python source: {error}") from error
