"""What patches replace or rely on: what a Megatron that is no known release is compared in."""

from __future__ import annotations

import functools

from megatron_fp32_router.patching.records import PATCHES


@functools.cache
def relied_on() -> dict[str, tuple[str, ...]]:
    """What patches replace or rely on, `module:path` -> ids of the patches that stand or fall with it."""
    found: dict[str, tuple[str, ...]] = {patch.key: () for patch in PATCHES}
    for patch in PATCHES:
        for name in (patch.key, *patch.names):
            found[name] = (*found.get(name, ()), patch.id)
    return {name: tuple(dict.fromkeys(ids)) for name, ids in found.items()}


@functools.cache
def _whole() -> frozenset[str]:
    return frozenset(name for patch in PATCHES for name in ((patch.key,) if patch.whole else ()) + patch.names)


def has_body(name: str) -> bool:
    """Whether the whole body of that target counts, so that it has fingerprints; otherwise facts about it do."""
    return name in _whole()
