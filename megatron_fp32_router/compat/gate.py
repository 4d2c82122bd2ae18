"""The gate: before a patch is applied, is the source that it relies on what it was written for?

What is compared is the source file of the Megatron module, and not the function object: a function that somebody else
has replaced before us is theirs, and registry.py deals with that. A file that is byte for byte a known release's needs
no parsing, so for an unmodified release the gate costs a few milliseconds in a process.
"""

from __future__ import annotations

import functools
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
def _judge(megatron: Megatron, accepted_file: str) -> Judge:
    assert megatron.path is not None
    file = accepted.read(Path(accepted_file)) if accepted_file else accepted.Accepted()
    if file.why_not:
        say(logging.WARNING, file.why_not, once=True)
    return Judge(Tree(megatron.path.parent.parent, known()), megatron, file.targets)


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
