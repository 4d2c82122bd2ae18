"""The gate's answer for a file that is no known release's. Imported only where there is one."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_fp32_router.log import say
from megatron_fp32_router.patching import accepted
from megatron_fp32_router.patching.judge import Judge, Target
from megatron_fp32_router.patching.megatron import Megatron
from megatron_fp32_router.patching.record import Needless, Patch
from megatron_fp32_router.patching.source import Tree, UnreadableSourceError
from megatron_fp32_router.patching.targets import relied_on


@functools.lru_cache(maxsize=2)
def judge_of(megatron: Megatron, accepted_file: str) -> Judge:
    assert megatron.path is not None
    file = accepted.read(Path(accepted_file)) if accepted_file else accepted.Accepted()
    if file.why_not:
        say(logging.WARNING, file.why_not, once=True)
    return Judge(Tree(megatron.path.parent.parent), megatron, file.targets)


@functools.lru_cache(maxsize=1024)
def _target(judge: Judge, name: str) -> Target:
    target = judge.one(name, explain=False)
    # The diff is computed only for what stops the program.
    return target if target.fits else judge.one(name)


def answer(patch: Patch, megatron: Megatron, accepted_file: str) -> tuple[str | None, Needless | None]:
    """What stands against applying a patch, and why that Megatron needs none: what gate.Finding holds."""
    judge = judge_of(megatron, accepted_file)
    for name, patches in relied_on().items():
        if patch.id not in patches:
            continue
        try:
            target = _target(judge, name)
        except UnreadableSourceError as error:
            return f"cannot be compared with what is known: {error}", None
        if not target.fits:
            what = "does not exist" if target.state == "missing" else "has changed"
            place = f"({judge.tree.root / target.file}:{target.line}: {target.detail})"
            own = patch.key == name
            return f"{what} {place}" if own else f"goes with {target.dotted}, which {what} {place}", None
    return None, judge.needless(patch)


def state_digest(module: str, tree: Tree) -> str:
    """One fingerprint of all targets in a module of that tree."""
    return hashlib.sha256("".join(_lines(module, tree)).encode()).hexdigest()[:16]


def _lines(module: str, tree: Tree) -> Iterator[str]:
    names: Iterable[str] = sorted(name for name in relied_on() if name.partition(":")[0] == module)
    for name in names:
        try:
            found = str(tree.body(name).digest) if tree.has(module) else "no such module"
        except UnreadableSourceError:
            found = "unreadable"  # importing it says why: the gate
        yield f"{name} {found}\n"
