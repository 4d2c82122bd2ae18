"""The gate: before a patch is applied, is the source that it relies on what it was written for?

What is compared is the source file of the Megatron module, and not the function object: a function that somebody else
has replaced before us is theirs, and registry.py deals with that. For a file that is byte for byte a known release's,
scripts/fingerprints has worked the answers out, and known_files.json holds them: nothing is parsed, and nothing else of
this package is imported.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from megatron_fp32_router.log import say
from megatron_fp32_router.patching.megatron import Megatron
from megatron_fp32_router.patching.record import Needless, Patch
from megatron_fp32_router.patching.records import relied_on

if TYPE_CHECKING:
    from megatron_fp32_router.patching.judge import Judge, Target

#: Of every module: which of its states each known file has; of every state: one fingerprint, and which patches are
#: needless there. `beside`: of each patch, the further modules that it relies on.
KNOWN_FILES: Final = files(__package__) / "known_files.json"


@dataclass(frozen=True)
class Finding:
    """What the source says about one patch.

    Attributes:
        objection: what stands against applying it, as the end of a sentence about its target; or None.
        needless: why this Megatron needs no such patch, or None.
    """

    objection: str | None = None
    needless: Needless | None = None


def file_hash(content: bytes | None) -> str:
    """What known_files.json keeps of a whole source file; "" of one that is not there."""
    return "" if content is None else hashlib.sha256(content).hexdigest()[:16]


@functools.cache
def _known_files() -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads(KNOWN_FILES.read_text(encoding="utf-8")))


@functools.lru_cache(maxsize=64)
def _state(root: Path, module: str) -> dict[str, Any] | None:
    """What is known of a module's file, or None where the file is no known release's."""
    known = _known_files()["modules"][module]
    path = root / module.replace(".", "/")
    content = None
    try:
        content = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_bytes()
    except FileNotFoundError:
        pass  # as in some releases; where it is not, what follows says so
    except OSError:
        return None  # judge.py is asked next, and says that it cannot be read
    index = known["files"].get(file_hash(content))
    return None if index is None else cast("dict[str, Any]", known["states"][index])


def look(patch: Patch, megatron: Megatron, accepted_file: str) -> Finding:
    """What the source of that Megatron says about a patch.

    Args:
        accepted_file: path of a file that `check --accept` wrote, or "".

    Raises:
        SettingsError: the accepted file cannot be read.
    """
    if megatron.path is None:
        return Finding("cannot be compared with what is known: the source files are not to be found")
    root = megatron.path.parent.parent
    states = [_state(root, module) for module in (patch.module, *_known_files()["beside"].get(patch.id, ()))]
    if not accepted_file and all(state is not None for state in states):
        return Finding(needless=states[0]["needless"].get(patch.id) if states[0] else None)
    return _judged(patch, megatron, accepted_file)


# A file that is no known release's ---------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _judge(megatron: Megatron, accepted_file: str) -> Judge:
    from megatron_fp32_router.patching import accepted
    from megatron_fp32_router.patching.judge import Judge
    from megatron_fp32_router.patching.source import Tree

    assert megatron.path is not None
    file = accepted.read(Path(accepted_file)) if accepted_file else accepted.Accepted()
    if file.why_not:
        say(logging.WARNING, file.why_not, once=True)
    return Judge(Tree(megatron.path.parent.parent), megatron, file.targets)


@functools.lru_cache(maxsize=1024)
def _target(judge: Judge, name: str) -> Target:
    target = judge.one(name, (), explain=False)
    # What has changed is worked out only for what stops the program.
    return target if target.fits else judge.one(name, ())


def _judged(patch: Patch, megatron: Megatron, accepted_file: str) -> Finding:
    from megatron_fp32_router.patching.source import UnreadableSourceError

    judge = _judge(megatron, accepted_file)
    for name, patches in relied_on().items():
        if patch.id not in patches:
            continue
        try:
            target = _target(judge, name)
        except UnreadableSourceError as error:
            return Finding(f"cannot be compared with what is known: {error}")
        if not target.fits:
            what = "does not exist" if target.state == "missing" else "has changed"
            place = f"({judge.tree.root / target.file}:{target.line}: {target.detail})"
            own = patch.key == name
            return Finding(f"{what} {place}" if own else f"goes with {target.dotted}, which {what} {place}")
    return Finding(needless=judge.needless(patch))


@functools.lru_cache(maxsize=2)
def digest(megatron: Megatron) -> str:
    """One fingerprint of everything that patches replace or rely on in that Megatron, imported or not: 16 digits.

    Ranks compare it. What the gate has read is not read again; in a fork whose every file has changed, all of it takes
    0.3 s.
    """
    if megatron.path is None:
        return "unknown, the source files are not to be found"
    root = megatron.path.parent.parent
    lines = []
    for module in _known_files()["modules"]:
        state = _state(root, module)
        lines.append(state["digest"] if state is not None else state_digest(module, _judge(megatron, "").tree))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def state_digest(module: str, tree: Any) -> str:
    """One fingerprint of all targets in a module of that tree."""
    return hashlib.sha256("".join(_lines(module, tree)).encode()).hexdigest()[:16]


def _lines(module: str, tree: Any) -> Iterator[str]:
    from megatron_fp32_router.patching.source import UnreadableSourceError

    names: Iterable[str] = sorted(name for name in relied_on() if name.partition(":")[0] == module)
    for name in names:
        try:
            found = str(tree.body(name).digest) if tree.has(module) else "no such module"
        except UnreadableSourceError:
            found = "unreadable"  # the gate has told whoever imports it why
        yield f"{name} {found}\n"
