"""The verdict about what all ranks have said: which ranks are missing, and which differ in what.

No torch and no store: a statement is what agreement.py writes for one rank, as plain values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_fp32_router.ranks.spans import ranks_text

Statements = Mapping[int, Mapping[str, Any]]


def verdict_on(ranks: Sequence[int], world: int, statements: Statements, waited: float) -> dict[str, Any]:
    """Compare.

    Args:
        ranks: those that train together.
        world: how many ranks the job has.
        statements: rank -> what it said; the others in `ranks` said nothing. At least one rank has.
        waited: for how many seconds the judge has waited.

    Returns:
        `problems`: sentences, none when all agree. `line`: the line for the log when they do. `says`: what was
        agreed. `speaker`: the first rank that said anything. `present`: how many ranks did.
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
        "problems": _problems(ranks, statements, waited),
        "line": line,
        "says": {label: value for statement in statements.values() for label, value in statement["says"].items()},
        "speaker": min(statements),
        "present": len(statements),
    }


def _problems(ranks: Sequence[int], statements: Statements, waited: float) -> list[str]:
    first = next(iter(statements.values()))["says"]
    if len(statements) == len(ranks) and all(statement["says"] == first for statement in statements.values()):
        return []
    from megatron_fp32_router.ranks import difference

    return difference.missing(ranks, statements, waited) + difference.differences(statements)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
