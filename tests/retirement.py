"""Which patch is needed on which release, and for what: the table in docs/patches.md, and what test_matrix.py asks.

A patch is needed for defects (defects.py), each of which has to be seen on a release with the plugin off, or for
another patch, with which it goes.
"""

from __future__ import annotations

from defects import defects_of
from packaging.version import Version

from megatron_fp32_router.records import PATCHES, Patch

REPAIRS = {
    "router-init": ("D12",),
    "router-reset": ("D12", "D13", "D18"),
    "router-casts": ("D1", "D2", "D3", "D4", "D5", "D6", "D7", "D8", "D9", "D10", "D11", "D12", "D13", "D18"),
    "gating": ("D14", "D16", "D17"),
    "padding-mask": ("D23",),
    "bias-rule": ("D6", "D7", "D8"),
    "bias-update": ("D6", "D7", "D8", "D24"),
    "counter-reset": ("D25",),
}

GOES_WITH = {"router-output": "gating", "inference-output": "gating", "bias-rule-in-finalize": "bias-rule"}

#: What is there because router tensors are fp32, by the room or file that its replacement comes from.
ROOMS = {
    "optim": "router-casts",
    "monitor": "router-casts",
    "protect.effect": "router-casts",
    "protect.agreement": "router-casts",
    "protect.split_cache": "gating",
}


def needed_for(patch: Patch) -> tuple[str, ...]:
    """Ids of the defects, or of the one patch, that *patch* is needed for.

    Raises:
        KeyError: neither is written down above.
    """
    if patch.id in REPAIRS:
        return REPAIRS[patch.id]
    if patch.id in GOES_WITH:
        return (GOES_WITH[patch.id],)
    file = patch.factory.partition(":")[0]
    return (ROOMS[file] if file in ROOMS else ROOMS[file.partition(".")[0]],)


def state_on(patch: Patch, release: str) -> str:
    """`needed`, `native` (upstream does it by itself there) or `n/a` (there is no such function), on a release."""
    version = Version(release)
    if version < Version(patch.since):
        return "n/a"
    if patch.until is not None and version >= Version(patch.until):
        return "n/a" if patch.gone else "native"
    names = needed_for(patch)
    others = {other.id: other for other in PATCHES}
    if names[0] in others:
        return "native" if state_on(others[names[0]], release) == "native" else "needed"
    return "needed" if set(names) & defects_of(release) else "native"
