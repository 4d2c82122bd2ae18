"""The verdict about what all ranks have said: who is missing, and who differs from whom in what.

No torch and no store: a statement is what agreement.py writes for one rank, as plain values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Statements = Mapping[int, Mapping[str, Any]]


def judge(ranks: Sequence[int], world: int, statements: Statements, waited: float) -> dict[str, Any]:
    """Compare.

    Args:
        ranks: those that train together.
        world: how many ranks the job has.
        statements: rank -> what it said; the others in `ranks` said nothing. At least one rank has.
        waited: for how many seconds the judge has waited.

    Returns:
        `problems`: sentences, none when all agree. `line`: one that speaks for all ranks then. `says`: what was
        agreed. `speaker`: the first rank that said anything. `present`: how many did.
    """
    counts = [int(statement["routers"]) for statement in statements.values()]
    tensors = sum(int(statement["tensors"]) for statement in statements.values())
    hosts = len({statement["host"] for statement in statements.values()})
    early = [rank for rank, statement in statements.items() if not statement["at optimizer"]]
    others = sorted(set(range(world)) - set(ranks))
    spread = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    line = (
        f"all {len(ranks)} ranks{f' (of {world})' if others else ''} on {_count(hosts, 'host')} agree: "
        f"{_count(sum(counts), 'router')} with {tensors} fp32 tensors, replicas counted, {spread} a rank"
    )
    if early:
        line += f"; no optimizer yet on {ranks_text(early)}"
    if others:
        line += f"; not compared, because no process group of Megatron's joins them to these: {ranks_text(others)}"
    return {
        "problems": _missing(ranks, statements, waited) + _differences(statements),
        "line": line,
        "says": {label: value for statement in statements.values() for label, value in statement["says"].items()},
        "speaker": min(statements),
        "present": len(statements),
    }


def _missing(ranks: Sequence[int], statements: Statements, waited: float) -> list[str]:
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


def _differences(statements: Statements) -> list[str]:
    """What is not alike. A thing that a rank does not mention is not compared: see what_must_agree()."""
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
    """The hosts of these ranks, and where on them lies what the label is about, for what lies anywhere."""
    hosts = f"host {_few({str(statements[rank]['host']) for rank in ranks})}"
    # An earlier version of the plugin does not say where.
    paths = {str(path) for rank in ranks if (path := statements[rank].get("where", {}).get(label)) is not None}
    return f"{hosts}: {_few(paths)}" if paths else hosts


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _few(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")


def ranks_text(ranks: Sequence[int]) -> str:
    """For example "rank 3", or "ranks 0-2, 7"."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    listed = ", ".join(texts[:20]) + (f" and {len(texts) - 20} more spans" if len(texts) > 20 else "")
    return f"rank{'' if len(ranks) == 1 else 's'} {listed}"
