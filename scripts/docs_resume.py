#!/usr/bin/env python3
"""Write the tables of docs/resume.md: scripts/docs_resume.py [--check].

    scripts/docs_resume.py            after scripts/test: make the tables again from what the tests recorded
    scripts/docs_resume.py --check    say whether docs/resume.md is what they recorded (exit code 1 if not)

The records are results/resume/RELEASE.jsonl (see resume_record in tests/megatron/conftest.py). A release line is
tested on its last release. An earlier one counts as tested with it only if the files in question have the same syntax
trees.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from bootstrap import RELEASES, ROOT, SetupError, ensure_release, explained, say

PAGE = ROOT / "docs" / "resume.md"
RECORDS = ROOT / "results" / "resume"
DIRECTIONS = ("on->on", "off->on", "on->off")
ABSENT = "-"

#: What saving and loading a router parameter's state passes through.
IN_QUESTION = (
    "optimizer/distrib_optimizer.py",
    "optimizer/optimizer.py",
    "distributed/distributed_data_parallel.py",
    "distributed/param_and_grad_buffer.py",
    "dist_checkpointing/mapping.py",
    "dist_checkpointing/optimizer.py",
    "dist_checkpointing/serialization.py",
    "dist_checkpointing/validation.py",
    "dist_checkpointing/strategies/torch.py",
)

Cell = tuple[str, str, str]


def line_of(release: str) -> str:
    """The line of a release: "0.16" for "0.16.1"."""
    return release.rpartition(".")[0]


def lines() -> dict[str, list[str]]:
    """Line -> its releases, oldest first."""
    return {line: list(releases) for line, releases in itertools.groupby(RELEASES, line_of)}


def digest(tree: Path) -> str:
    """A digest of the code of the files in question below *tree*, without comments and docstrings."""
    whole = hashlib.sha256()
    for name in IN_QUESTION:
        module = ast.parse((tree / "megatron" / "core" / name).read_text(encoding="utf-8"))
        for node in ast.walk(module):
            body = getattr(node, "body", None)
            if (
                isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
                and body
                and ast.get_docstring(node, False)
            ):
                node.body = body[1:]
        whole.update(ast.dump(module).encode())
    return whole.hexdigest()


def recorded(release: str) -> dict[Cell, str]:
    """(optimizer, sharding, direction) -> outcome; the last record of a cell counts."""
    path = RECORDS / f"{release}.jsonl"
    if not path.exists():
        raise SetupError(f"{path} is missing: run scripts/test {release} first")
    found = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(text)
        found[record["optimizer"], record["sharding"], record["direction"]] = record["outcome"]
    return found


def known_formats(tree: Path) -> set[str]:
    """The sharding types that the distributed optimizer below *tree* can load."""
    source = (tree / "megatron" / "core" / "optimizer" / "distrib_optimizer.py").read_text(encoding="utf-8")
    return {"torch", *re.findall(r"if sharding_type == '(dp_\w+|fully_\w+)':", source)}


def check_complete(release: str, found: Mapping[Cell, str], tree: Path) -> None:
    """Raise SetupError when a cell that this release has was not tested."""
    rows = [("DistributedOptimizer", name) for name in sorted(known_formats(tree))]
    rows += [("Float16OptimizerWithFloat16Params", name) for name in ("torch", "torch_dist")]
    missing = [f"{row} {direction}" for row in rows for direction in DIRECTIONS if (*row, direction) not in found]
    if missing:
        raise SetupError(f"{release}: no test has recorded {'; '.join(missing)}")


def resume_table() -> str:
    """The table of outcomes, and what each line's column rests on."""
    columns: dict[str, dict[Cell, str]] = {}
    rests: list[str] = []
    for line, releases in lines().items():
        last, tree = releases[-1], ensure_release(releases[-1])
        columns[line] = recorded(last)
        check_complete(last, columns[line], tree)
        same, code = [], digest(tree)
        for release in releases[:-1]:
            if digest(ensure_release(release)) == code:
                same.append(release)
                continue
            check_complete(release, recorded(release), ensure_release(release))
            differing = {cell for cell, outcome in recorded(release).items() if columns[line].get(cell) != outcome}
            if differing:
                raise SetupError(f"{release} does not behave as {last}: {sorted(differing)}")
            rests.append(f"{release} (other code than {last}, same outcomes)")
        rests.append(f"{last}" + (f" (same code: {', '.join(same)})" if same else ""))
    names = list(columns)
    rows = sorted({cell for column in columns.values() for cell in column}, key=_order)
    text = [
        f"| optimizer | format | before → after | {' | '.join(names)} |",
        f"|---|---|---|{'---|' * len(names)}",
    ]
    for optimizer, sharding, direction in rows:
        outcomes = [columns[name].get((optimizer, sharding, direction), ABSENT) for name in names]
        text.append(f"| {optimizer} | `{sharding}` | {direction.replace('->', ' → ')} | {' | '.join(outcomes)} |")
    return "\n".join([*text, "", f"Tested on {'; '.join(rests)}."])


def _order(cell: Cell) -> tuple[int, str, str, int]:
    optimizer, sharding, direction = cell
    first = ("DistributedOptimizer", "Float16OptimizerWithFloat16Params")
    place = first.index(optimizer) if optimizer in first else len(first)
    return place, optimizer, sharding, DIRECTIONS.index(direction)


# Memory ---------------------------------------------------------------------------------------------------------------

MOMENTS = 8


def bytes_per_parameter(optimizer: str, *, fp32: bool, grad_bytes: int, ranks: int) -> float:
    """Bytes that one rank holds for one router parameter: weight, gradient buffer, main copy, Adam's two moments.

    Args:
        optimizer: "plain" or "distributed".
        fp32: whether the parameter is fp32 (the plugin on) or bf16 (off).
        grad_bytes: of a bf16 parameter's gradient: 4 with grad_reduce_in_fp32, else 2. An fp32 one's has 4.
        ranks: data-parallel ranks, over which a distributed optimizer spreads its state.
    """
    share = ranks if optimizer == "distributed" else 1
    if fp32:
        return 4 + 4 + MOMENTS / share  # its own main copy
    return 2 + grad_bytes + (4 + MOMENTS) / share


def memory_table() -> str:
    """Bytes per parameter, and DeepSeek-V3's shape worked out."""
    layers, experts, hidden = 58, 256, 7168
    count = layers * experts * hidden
    text = [
        "| optimizer | bf16 gradients reduced in | off | on | difference | all of DeepSeek-V3's routers on a rank |",
        "|---|---|---|---|---|---|",
    ]
    for optimizer, ranks in (("plain", 1), ("distributed", 1), ("distributed", 64)):
        for grad_bytes in (4, 2):
            off, on = (
                bytes_per_parameter(optimizer, fp32=fp32, grad_bytes=grad_bytes, ranks=ranks) for fp32 in (False, True)
            )
            where = optimizer if optimizer == "plain" else f"distributed over {ranks}"
            reduced = "fp32" if grad_bytes == 4 else "bf16"
            total = (on - off) * count / 2**20
            text.append(f"| {where} | {reduced} | {off:g} | {on:g} | {on - off:+g} | {total:+.1f} MiB |")
    stage = 4
    part = stage * experts * hidden
    extra = part * (
        bytes_per_parameter("distributed", fp32=True, grad_bytes=4, ranks=64)
        - bytes_per_parameter("distributed", fp32=False, grad_bytes=4, ranks=64)
    )
    text += [
        "",
        f"Bytes per router parameter and rank. DeepSeek-V3's shape: {layers} MoE layers x {experts} experts x hidden "
        f"{hidden} = {count:,} router parameters. No rank holds all of them: with {stage} MoE layers on a pipeline "
        f"stage, {part:,} parameters, the distributed optimizer over 64 ranks takes {extra / 2**20:+.1f} MiB, the "
        f"all-gather of parameters moves {2 * part / 2**20:.1f} MiB more a step, and the model's part of a checkpoint "
        f"grows by {2 * count / 2**20:.0f} MiB in all.",
    ]
    return "\n".join(text)


def page(text: str, tables: Iterable[tuple[str, str]]) -> str:
    """*text* with each named part between its two marks replaced."""
    for name, table in tables:
        start, end = f"<!-- {name}: written by scripts/docs_resume.py -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise SetupError(f"{PAGE} has no place for {name}: {start} … {end}")
        text = f"{before}{start}\n{table}\n{end}{after}"
    return text


def main(arguments: list[str]) -> int:
    """Write the page, or with --check compare it; return the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    old = PAGE.read_text(encoding="utf-8")
    new = page(old, [("resume table", resume_table()), ("memory table", memory_table())])
    if "--check" in arguments:
        say("docs/resume.md is up to date." if new == old else "docs/resume.md is stale: run scripts/docs_resume.py")
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    say(f"{PAGE}: {'unchanged' if new == old else 'written'}")
    return 0


if __name__ == "__main__":
    with explained():
        sys.exit(main(sys.argv[1:]))
