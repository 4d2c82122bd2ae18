"""What patches replace or rely on: what is compared in a Megatron that is no known release."""

from __future__ import annotations

import functools

from megatron_fp32_router.patching.record import Patch
from megatron_fp32_router.patching.records import PATCHES


def _beside(patch: Patch) -> tuple[str, ...]:
    """`module:path` of everything that a patch relies on beside its target."""
    pairs = (entry.partition(":") for entry in patch.relies_on)
    return tuple(f"{module}:{name}" for module, _, names in pairs for name in names.split())


@functools.cache
def relied_on() -> dict[str, tuple[str, ...]]:
    """What patches replace or rely on, `module:path` -> ids of the patches that a change in it concerns."""
    found: dict[str, tuple[str, ...]] = {patch.key: () for patch in PATCHES}
    for patch in PATCHES:
        for name in (patch.key, *_beside(patch)):
            found[name] = (*found.get(name, ()), patch.id)
    return {name: tuple(dict.fromkeys(ids)) for name, ids in found.items()}


@functools.cache
def _whole() -> frozenset[str]:
    return frozenset(name for patch in PATCHES for name in ((patch.key,) if patch.whole else ()) + _beside(patch))


def has_body(name: str) -> bool:
    """Whether the whole body of that target counts, so that it has fingerprints; otherwise facts about it do."""
    return name in _whole()
