"""The messages about ranks that differ or are missing. Imported only where there are any.

No torch and no store, as in verdict.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_fp32_router.ranks.spans import ranks_text

Statements = Mapping[int, Mapping[str, Any]]


def awaited(timeout: float, silent: Sequence[int], building: Sequence[int]) -> str:
    """Which ranks the others wait for: those that have said nothing, and those that have no optimizer yet."""
    parts = [f"a first message from {ranks_text(silent)}"] if silent else []
    parts += [f"the optimizer of {ranks_text(building)}"] if building else []
    return (
        f"waiting up to {timeout:g} s for {' and '.join(parts) or 'the verdict'}, to learn whether all ranks run the "
        "plugin alike"
    )


def missing(ranks: Sequence[int], statements: Statements, waited: float) -> list[str]:
    """The ranks that have said nothing, by host."""
    # A rank that says nothing does not say where it is; its neighbours on the node do, under torchrun.
    nodes = {}
    for rank, statement in statements.items():
        size = str(statement["local world size"])
        if size.isdigit() and int(size) > 0:
            nodes[rank // int(size), int(size)] = str(statement["host"])
    by_host: dict[str, list[int]] = {}
    for rank in sorted(set(ranks) - set(statements)):
        known = [host for (node, size), host in nodes.items() if rank // size == node]
        by_host.setdefault(known[0] if known else "unknown, no rank of that node runs the plugin", []).append(rank)
    return [
        f"nothing was heard for {waited:.0f} s from {ranks_text(silent)} (host {host}): the plugin is not on there "
        "(not installed, not imported, or switched off), building the model takes longer there, or no model is "
        "trained there, though it shares a process group of Megatron's with ranks that train one"
        for host, silent in by_host.items()
    ]


def differences(statements: Statements) -> list[str]:
    """What is not alike. Only ranks that mention a thing are compared in it: see what_must_agree()."""
    labels = list(dict.fromkeys(label for statement in statements.values() for label in statement["says"]))
    found = []
    for label in labels:
        sides: dict[str, list[int]] = {}
        for rank, statement in statements.items():
            if label in statement["says"]:
                sides.setdefault(str(statement["says"][label]), []).append(rank)
        if len(sides) > 1:
            texts = [
                f"{value!r} on {ranks_text(ranks)} ({_places(label, statements, ranks)})"
                for value, ranks in sides.items()
            ]
            found.append(f"{label} is {', but '.join(texts)}")
    return found


def _places(label: str, statements: Statements, ranks: Sequence[int]) -> str:
    """The hosts of these ranks and, for a label about files, the paths of those files there."""
    hosts = f"host {_few({str(statements[rank]['host']) for rank in ranks})}"
    # An earlier version of the plugin does not say where.
    paths = {str(path) for rank in ranks if (path := statements[rank].get("where", {}).get(label)) is not None}
    return f"{hosts}: {_few(paths)}" if paths else hosts


def _few(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")
