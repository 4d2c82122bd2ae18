"""One text for everything that behaves alike: a definition without docstrings, comments, formatting and annotations.

The text is our own and not ast.dump's, which differs between Python versions: the same source must give the same
fingerprint under every Python that the plugin runs on. What counts: names, decorators, default values, the order of
statements, every constant. What does not: docstrings, comments, layout, quotes, type annotations.
"""

from __future__ import annotations

import ast
import copy
import hashlib
from collections.abc import Callable, Iterator, Set
from typing import Final

#: Fields that say nothing about behaviour, or that only some Python versions have (type_params: 3.12).
_IGNORED: Final = frozenset(
    {"annotation", "ctx", "kind", "returns", "simple", "type_comment", "type_ignores", "type_params"}
)
#: Columns beyond which a line of a diff is broken.
_LONG: Final = 100
FUNCTIONS: Final = (ast.FunctionDef, ast.AsyncFunctionDef)
_NAMED: Final = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class _Normaliser(ast.NodeTransformer):
    """Takes out what the fingerprint ignores, so that the text shown in a diff shows nothing else."""

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        node.body = _without_docstring(node.body)
        node.returns = None
        node.type_comment = None
        self.generic_visit(node)
        node.body = node.body or [ast.Pass()]
        return node

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        # Annotated fields of a class stay: a dataclass is made of them.
        node.body = _without_docstring(node.body)
        node.body = [item if isinstance(item, ast.AnnAssign) else self.visit(item) for item in node.body]
        node.decorator_list = [self.visit(item) for item in node.decorator_list]
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        node.type_comment = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if node.value is None:
            return None
        value = self.visit(node.value)
        return ast.copy_location(ast.Assign(targets=[node.target], value=value), node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        # Python 3.12 parses f-strings anew and may cut their constant parts elsewhere.
        self.generic_visit(node)
        parts: list[ast.expr] = []
        for part in node.values:
            last = parts[-1] if parts else None
            if _is_text(part) and last is not None and _is_text(last):
                parts[-1] = ast.copy_location(ast.Constant(last.value + part.value), last)  # type: ignore[attr-defined]
            elif not (_is_text(part) and not part.value):  # type: ignore[attr-defined]
                parts.append(part)
        node.values = parts
        return node


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    if body and isinstance(body[0], ast.Expr) and _is_text(body[0].value):
        body = body[1:]
    return body


def normalised(definitions: list[ast.stmt]) -> ast.Module:
    """The definitions without what the fingerprint ignores. Line numbers stay those of the source.

    Mutates its input; pass each node once.
    """
    module = ast.Module(body=definitions, type_ignores=[])
    for node in ast.walk(module):
        # An If or a With whose only statement was `x: int` must not lose its body.
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and all(isinstance(s, ast.AnnAssign) and s.value is None for s in body):
            body[:] = [ast.copy_location(ast.Pass(), body[0])]
    result = _Normaliser().visit(module)
    assert isinstance(result, ast.Module)
    return result


def text(module: ast.Module) -> str:
    """Normalised source. How it is laid out depends on the Python that prints it; see `digest`."""
    return ast.unparse(module)


def lines(module: ast.Module) -> list[str]:
    """Normalised source for a diff: long lines are broken after every argument, so that one change is one line."""
    return [part for line in text(module).splitlines() for part in (_broken(line) if len(line) > _LONG else [line])]


def _broken(line: str) -> list[str]:
    """One line of source as several, broken inside its outermost brackets."""
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    parts, start, depth, quote = [], 0, 0, ""
    for place, letter in enumerate(line):
        if quote:
            if letter == quote and line[place - 1] != "\\":
                quote = ""
        elif letter in "\"'":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        if not quote and ((letter == "," and depth == 1) or (letter in "([{" and depth == 1)):
            parts.append(line[start : place + 1].strip())
            start = place + 1
    parts.append(line[start:].strip())
    return [line[: len(line) - len(line.lstrip())] + parts[0], *(indent + part for part in parts[1:] if part)]


def digest(module: ast.Module) -> str:
    """The fingerprint of what `normalised` returned: 32 hexadecimal digits, the same under every Python."""
    parts: list[str] = []
    _write(module, parts.append)
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:32]


def _write(value: object, put: Callable[[str], None]) -> None:
    if isinstance(value, ast.AST):
        put(f"({type(value).__name__}")
        for name in sorted(value._fields):
            if name in _IGNORED:
                continue
            # A newer Python's extra fields are empty for what older ones can express.
            part = getattr(value, name, None)
            if part is not None and part != []:
                put(f" {name}=")
                _write(part, put)
        if isinstance(value, ast.Constant) and value.value is None:
            put(" None")
        put(")")
    elif isinstance(value, list):
        put("[")
        for item in value:
            if item is None:
                put("-")  # a missing default among keyword-only ones, or `**` in a dict
            else:
                _write(item, put)
        put("]")
    else:
        # ascii(), since what repr() escapes follows the Python version's Unicode tables.
        put(f"{type(value).__name__}:{value!a}")


# Finding definitions ----------------------------------------------------------------------------------------------


def definitions(tree: ast.Module, module: str, path: str) -> list[ast.stmt]:
    """Every statement of `tree` that binds `path` (`name`, `Class` or `Class.method`), in order; [] when none does.

    Of a class the header alone: its name, bases and decorators. A definition under `if`, `try` or `with` comes with
    that condition. Also found: an imported name, and whatever rebinds or deletes `path` while the module runs; see
    `_rebinds`. What code in functions does when they are called is not seen.

    Args:
        tree: the parsed module.
        module: its dotted name, which relative imports are resolved against.
        path: what is looked for.
    """
    first, _, rest = path.partition(".")
    found: list[ast.stmt] = []
    owners = {first}
    for conditions, statement in _statements(tree.body):
        if isinstance(statement, ast.Assign) and _is_name(statement.value, owners):
            owners |= {target.id for target in statement.targets if isinstance(target, ast.Name)}
        if found and isinstance(statement, ast.ImportFrom) and statement.names[0].name == "*":
            # It may bind any name; only an import would tell which.
            found += _wrapped(
                conditions, ast.copy_location(_absolute(statement, statement.names[0], module), statement)
            )
        elif not rest:
            found += _wrapped(conditions, _binding(statement, first, module))
        elif isinstance(statement, ast.ClassDef) and statement.name == first:
            for inner, member in _statements(statement.body):
                found += _wrapped(conditions + inner, _binding(member, rest, module))
        elif _rebinds(statement, rest, owners):
            found += _wrapped(conditions, statement)
        elif found:
            found += _wrapped(conditions, _binding(statement, first, module))  # another class of that name
    return found


def _statements(
    body: list[ast.stmt], conditions: tuple[ast.expr, ...] = ()
) -> Iterator[tuple[tuple[ast.expr, ...], ast.stmt]]:
    """Every statement of a body that runs when the module does, with the conditions that it stands under."""
    for statement in body:
        if isinstance(statement, ast.If):
            yield from _statements(statement.body, (*conditions, statement.test))
            yield from _statements(statement.orelse, (*conditions, ast.UnaryOp(ast.Not(), statement.test)))
        elif isinstance(statement, ast.Try):
            yield from _statements(statement.body, (*conditions, ast.Constant("try")))
            for handler in statement.handlers:
                caught = ast.unparse(handler.type) if handler.type is not None else ""
                yield from _statements(handler.body, (*conditions, ast.Constant(f"except {caught}".strip())))
            yield from _statements(statement.orelse, (*conditions, ast.Constant("try: else")))
            yield from _statements(statement.finalbody, conditions)
        elif isinstance(statement, ast.With):
            yield from _statements(statement.body, conditions)
        else:
            yield conditions, statement


def _binding(statement: ast.stmt, name: str, module: str) -> ast.stmt | None:
    """The part of `statement` that binds `name`, or None."""
    if isinstance(statement, FUNCTIONS):
        return statement if statement.name == name else None
    if isinstance(statement, ast.ClassDef) and statement.name == name:
        header = copy.copy(statement)
        header.body = [ast.copy_location(ast.Pass(), statement)]
        return header
    if isinstance(statement, ast.ImportFrom | ast.Import):
        for alias in statement.names:
            if (alias.asname or alias.name) == name:
                return ast.copy_location(_absolute(statement, alias, module), statement)
        return None
    return statement if _rebinds(statement, name) else None


def _rebinds(statement: ast.stmt, name: str, owners: Set[str] = frozenset()) -> bool:
    """Whether a statement that is no definition and no import binds or deletes `name`, or that attribute of an owner.

    By assignment of any form, `del`, a walrus, setattr() or delattr(), also inside a loop, where the owner may have the
    loop's name; or, for a name of the module, through globals().

    Args:
        owners: names of the class whose attribute it is; none for a name of the module or class body itself.
    """
    if isinstance(statement, _NAMED | ast.Import | ast.ImportFrom):
        return False
    if isinstance(statement, ast.AnnAssign) and statement.value is None:
        return False
    nodes = list(_run(statement))
    for node in nodes:
        if owners and isinstance(node, ast.For) and _may_contain(node.iter, owners):
            owners = owners | {target.id for target in ast.walk(node.target) if isinstance(target, ast.Name)}
    return any(_binds(node, name, owners) for node in nodes)


def _binds(node: ast.AST, name: str, owners: Set[str]) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
        if len(node.args) < 2:
            return False
        of_module = not owners and "sys.modules" in ast.unparse(node.args[0])
        return (of_module or _is_name(node.args[0], owners)) and _may_be(node.args[1], name)
    if isinstance(getattr(node, "ctx", None), ast.Load):
        return False
    if isinstance(node, _NAMED):
        return not owners and node.name == name
    if isinstance(node, ast.alias):
        return not owners and (node.asname or node.name) in (name, "*")
    if isinstance(node, ast.Name):
        return not owners and node.id == name
    if isinstance(node, ast.Attribute):
        return node.attr == name and _is_name(node.value, owners)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Call) and not owners:
        return _is_name(node.value.func, {"globals", "locals", "vars"}) and _may_be(node.slice, name)
    return False


def _is_name(node: ast.expr, names: Set[str]) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def _may_be(node: ast.expr, name: str) -> bool:
    """Whether an expression may evaluate to that text: it is that constant, or running it is the only way to know."""
    return not isinstance(node, ast.Constant) or node.value == name


def _may_contain(node: ast.expr, names: Set[str]) -> bool:
    """Whether a loop may go over one of these: it is listed, or running the program is the only way to know."""
    if isinstance(node, ast.Tuple | ast.List | ast.Set) and all(isinstance(item, ast.Name) for item in node.elts):
        return any(_is_name(item, names) for item in node.elts)
    return True


def _run(statement: ast.stmt) -> Iterator[ast.AST]:
    """Every node that runs when the statement runs: not the bodies of functions and classes defined in it."""
    todo: list[ast.AST] = [statement]
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, ast.comprehension):
            todo += [node.iter, *node.ifs]  # its variable is its own
        elif not isinstance(node, _NAMED | ast.Lambda):
            todo += ast.iter_child_nodes(node)


def _absolute(statement: ast.ImportFrom | ast.Import, alias: ast.alias, module: str) -> ast.stmt:
    if isinstance(statement, ast.Import):
        return ast.Import(names=[alias])
    source = statement.module or ""
    if statement.level:
        parents = module.split(".")[: -statement.level]
        source = ".".join([*parents, source] if source else parents)
    return ast.ImportFrom(module=source, names=[alias], level=0)


def _wrapped(conditions: tuple[ast.expr, ...], statement: ast.stmt | None) -> list[ast.stmt]:
    if statement is None:
        return []
    for condition in reversed(conditions):
        statement = ast.copy_location(ast.If(test=condition, body=[statement], orelse=[]), statement)
    return [statement]


def imported(statement: ast.stmt) -> str:
    """The full name that an import of `definitions` binds, under whatever condition; "" for what is no import."""
    while isinstance(statement, ast.If):
        statement = statement.body[0]
    if isinstance(statement, ast.Import):
        return statement.names[0].name
    return f"{statement.module}.{statement.names[0].name}" if isinstance(statement, ast.ImportFrom) else ""


def first_difference(found: ast.Module, known: ast.Module) -> int | None:
    """The line of `found`'s source where it first differs from `known`, or None when it does not.

    Where something has only been taken away, the line of the statement that it stood in.
    """

    def walk(one: object, other: object, line: int) -> int | None:
        if isinstance(one, ast.AST):
            line = getattr(one, "lineno", line)
            if type(one) is not type(other):
                return line
            for name in one._fields:
                if name not in _IGNORED:
                    where = walk(getattr(one, name, None), getattr(other, name, None), line)
                    if where is not None:
                        return where
            return None
        if isinstance(one, list) and isinstance(other, list):
            for mine, theirs in zip(one, other, strict=False):
                where = walk(mine, theirs, line)
                if where is not None:
                    return where
            if len(one) > len(other):
                return int(getattr(one[len(other)], "lineno", line))
            return line if len(one) < len(other) else None
        return None if one == other and type(one) is type(other) else line

    return walk(found, known, getattr(found.body[0], "lineno", 1) if found.body else 1)
