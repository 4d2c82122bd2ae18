"""The gate: before a patch is applied, is the source that it relies on what it was written for?

What is compared is the source file of the Megatron module, and not the function object: a function that somebody else
has replaced before us is theirs, and registry.py deals with that. A file that is byte for byte a known release's needs
no parsing, so for an unmodified release the gate costs a few milliseconds in a process.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from pathlib import Path

from megatron_fp32_router.compat import accepted
from megatron_fp32_router.compat.contracts import key, relied_on
from megatron_fp32_router.compat.fingerprints import known
from megatron_fp32_router.compat.judge import Judge, Target
from megatron_fp32_router.compat.source import Tree, UnreadableSourceError
from megatron_fp32_router.records import PATCHES
from megatron_fp32_router.say import say
from megatron_fp32_router.upstream import Megatron


@functools.lru_cache(maxsize=2)
def _tree(megatron: Megatron) -> Tree:
    assert megatron.path is not None
    return Tree(megatron.path.parent.parent, known())


@functools.lru_cache(maxsize=2)
def _judge(megatron: Megatron, accepted_file: str) -> Judge:
    file = accepted.read(Path(accepted_file)) if accepted_file else accepted.Accepted()
    if file.why_not:
        say(logging.WARNING, file.why_not, once=True)
    return Judge(_tree(megatron), megatron, file.targets)


@functools.lru_cache(maxsize=1024)
def _target(judge: Judge, name: str) -> Target:
    target = judge.one(name, (), explain=False)
    # What has changed is worked out only for what stops the program.
    return target if target.fits else judge.one(name, ())


def objection(patch_id: str, megatron: Megatron, accepted_file: str) -> str | None:
    """What stands against applying a patch to that Megatron, as the end of a sentence about its target; or None.

    Args:
        accepted_file: path of a file that `check --accept` wrote, or "".

    Raises:
        SettingsError: the accepted file cannot be read.
    """
    if megatron.path is None:
        return "cannot be compared with what is known: the source files are not to be found"
    judge = _judge(megatron, accepted_file)
    for name, patches in relied_on().items():
        if patch_id not in patches:
            continue
        try:
            target = _target(judge, name)
        except UnreadableSourceError as error:
            return f"cannot be compared with what is known: {error}"
        if not target.fits:
            what = "does not exist" if target.state == "missing" else "has changed"
            place = f"({judge.tree.root / target.file}:{target.line}: {target.detail})"
            own = any(key(patch.module, patch.path) == name for patch in PATCHES if patch.id == patch_id)
            return f"{what} {place}" if own else f"goes with {target.dotted}, which {what} {place}"
    return None


@functools.lru_cache(maxsize=2)
def digest(megatron: Megatron) -> str:
    """One fingerprint of everything that patches replace or rely on in that Megatron, imported or not: 16 digits.

    Ranks compare it. What the gate has read is not read again; in a fork whose every file has changed, all of it takes
    0.2 s.
    """
    if megatron.path is None:
        return "unknown, the source files are not to be found"
    tree = _tree(megatron)
    lines = []
    for name in sorted(relied_on()):
        try:
            found = str(tree.body(name).digest) if tree.has(name.partition(":")[0]) else "no such module"
        except UnreadableSourceError:
            found = "unreadable"  # the gate has told whoever imports it why
        lines.append(f"{name} {found}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]
