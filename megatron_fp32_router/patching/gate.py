"""The gate: before a patch is applied, is the source that it relies on what it was written for?

What is compared is the source file of the Megatron module, and not the function object: a function that somebody else
has replaced before us is theirs, and registry.py deals with that. For a file that is byte for byte a known release's,
scripts/fingerprints has worked the answers out, and known_files.json holds them: nothing is parsed. For another one
drift.py is imported, and compares what it defines.
"""

from __future__ import annotations

import functools
import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

from megatron_fp32_router.patching.megatron import Megatron
from megatron_fp32_router.patching.record import Needless, Patch

#: For every module: which state each known file is in (`files`), and of each state a fingerprint and the patches that
#: are needless there (`states`). `beside`: for each patch, the other modules that it relies on.
KNOWN_FILES: Final = files(__package__) / "known_files.json"


class Finding(NamedTuple):
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
def known_files() -> dict[str, Any]:
    """What known_files.json holds."""
    return cast("dict[str, Any]", json.loads(KNOWN_FILES.read_text(encoding="utf-8")))


@functools.lru_cache(maxsize=64)
def state_of(root: Path, module: str) -> dict[str, Any] | None:
    """What is known of a module's file, or None where the file is no known release's."""
    known = known_files()["modules"][module]
    path = root / module.replace(".", "/")
    try:
        content = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_bytes()
    except FileNotFoundError:
        content = None  # some releases have no such file; where it ought to be there, drift.py says that it is missing
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
    states = [state_of(root, module) for module in (patch.module, *known_files()["beside"].get(patch.id, ()))]
    if not accepted_file and states[0] is not None and None not in states:
        return Finding(needless=states[0]["needless"].get(patch.id))
    from megatron_fp32_router.patching import drift

    return Finding(*drift.answer(patch, megatron, accepted_file))
