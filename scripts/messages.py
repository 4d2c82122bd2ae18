"""The messages of the package, read from its source: what docs/troubleshooting.md is made from.

Nothing is imported: most of the modules need torch or Megatron. What varies in a message is shown as "…".
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Final

from bootstrap import ROOT

PACKAGE: Final = ROOT / "megatron_fp32_router"
BASE: Final = "Fp32RouterError"

#: Functions that make the message of a CombinationRefusedError from what they are given: (found, why, instead).
REFUSALS: Final = ("refuse", "refuse_in")

Scope = ast.Module | ast.FunctionDef


@dataclass
class ErrorClass:
    """An exception of ours: its docstring, the class it derives from, and the messages that it is raised with."""

    name: str
    base: str
    says: str
    messages: list[str] = field(default_factory=list)


@cache
def errors() -> dict[str, ErrorClass]:
    """Every class that derives from Fp32RouterError, by name, that one first."""
    found: dict[str, ErrorClass] = {}
    definitions = [node for tree in _trees() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    for _ in definitions:  # again and again: a base class may be read after what derives from it
        for node in definitions:
            bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
            base = next((base for base in bases if base in found), BASE if node.name == BASE else None)
            if base is not None and node.name not in found:
                found[node.name] = ErrorClass(node.name, base, _first_sentences(node))
    for tree in _trees():
        for scope, call in _calls(tree, tree):
            for name, message in _raised(scope, call, tree, found):
                if message not in found[name].messages and re.search(r"\w{3}", message):
                    found[name].messages.append(message)
    return found


@cache
def warnings() -> list[str]:
    """Every warning that is logged, in alphabetical order."""
    said = set()
    for tree in _trees():
        for scope, call in _calls(tree, tree):
            if _name(call.func).lstrip("_") == "say" and "WARNING" in ast.unparse(call.args[0]):
                said.update(_texts(call.args[1], scope, tree))
    return sorted((message for message in said if re.search(r"\w{3}", message)), key=lambda m: m.strip("… ").lower())


@cache
def _trees() -> list[ast.Module]:
    return [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))]


def _first_sentences(node: ast.ClassDef) -> str:
    return " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())


def _calls(node: ast.AST, scope: Scope) -> Iterator[tuple[Scope, ast.Call]]:
    """Every call below `node`, with the function that it stands in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call):
            yield scope, child
        yield from _calls(child, child if isinstance(child, ast.FunctionDef) else scope)


def _raised(scope: Scope, call: ast.Call, tree: ast.Module, known: dict[str, ErrorClass]) -> Iterator[tuple[str, str]]:
    """(class, message) of what this call raises or makes, where it does."""
    name = _name(call.func)
    if name in known and call.args:
        yield from ((name, text) for text in _texts(call.args[0], scope, tree))
    elif name == "mismatch" and len(call.args) > 1:
        classes = [_name(value) for value in (call.args[0], *_assigned(call.args[0], scope, tree))]
        for text in _texts(call.args[1], scope, tree):
            yield from ((each, text) for each in classes if each in known)
    elif name in REFUSALS:
        parts = [text for argument in call.args for text in _texts(argument, scope, tree) if text != "…"]
        if len(parts) == 3:
            found, why, instead = parts
            message = f"{found} with … fp32 router parameters beside … ones: {why}. {instead}, or …"
            yield "CombinationRefusedError", message


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _texts(node: ast.expr, scope: Scope, tree: ast.Module) -> list[str]:
    """What a string expression may say; a name is looked up where it is assigned."""
    values = _assigned(node, scope, tree) if isinstance(node, ast.Name | ast.Attribute) else [node]
    return list(dict.fromkeys(_shortened(_text(value)) for value in values))


def _assigned(node: ast.expr, scope: Scope, tree: ast.Module) -> list[ast.expr]:
    """What is assigned to this name in its function, or to this attribute in its module."""
    wanted, found = ast.unparse(node), []
    for statement in ast.walk(tree if isinstance(node, ast.Attribute) else scope):
        if not isinstance(statement, ast.Assign):
            continue
        for target in statement.targets:
            both = isinstance(target, ast.Tuple) and isinstance(statement.value, ast.Tuple)
            pairs = zip(target.elts, statement.value.elts, strict=True) if both else [(target, statement.value)]  # type: ignore[attr-defined]
            found += [value for name, value in pairs if ast.unparse(name) == wanted]
    return found


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "…"
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.FormattedValue):
        return "MEGATRON_FP32_ROUTER" if _name(node.value) == "PREFIX" else "…"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "…"


def _shortened(text: str) -> str:
    return re.sub(r"…(?:[\s:,/(]{0,2}…\)?)+", "…", " ".join(text.split()))
