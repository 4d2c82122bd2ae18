"""Taking patches back: disable().

Imported with the package. A later import could find another copy of the plugin that is in this process too, and would
take back the patches of that one.
"""

from __future__ import annotations

import sys

from megatron_fp32_router.errors import DisplacedPatchError
from megatron_fp32_router.patching.chain import unwrap
from megatron_fp32_router.patching.owner import AT_UNDO, PLACE
from megatron_fp32_router.patching.records import PATCHES
from megatron_fp32_router.patching.registry import position_of, registry


def undo_all() -> None:
    """Put the identical original objects back.

    Raises:
        DisplacedPatchError: somebody else's patch sits on one of ours; nothing has been changed then.
    """
    for cls, (_, ours) in registry.router_classes.items():
        if vars(cls).get("_apply") is not ours:
            raise DisplacedPatchError(
                f"{cls.__module__}.{cls.__qualname__}._apply has been replaced since protect_router_class(); put back "
                "what was there, then disable()"
            )
    placed = []
    for patch in PATCHES:
        module = sys.modules.get(patch.module)
        if patch.id in registry.replacements and module is not None:
            position, above = position_of(patch, module)
            if position == "below":
                raise DisplacedPatchError(
                    f"{patch.target} has been wrapped by {above} since; take that off first, then disable()"
                )
            if position == "outermost":
                placed.append((patch, module))
    # Backwards: of two that share a target, the later one wraps the other.
    for patch, module in reversed(placed):
        replacement = registry.replacements[patch.id]
        unwrap(module, getattr(replacement, PLACE, patch.path), replacement)
    for replacement in registry.replacements.values():
        getattr(replacement, AT_UNDO, lambda: None)()
    for cls, (own, _) in registry.router_classes.items():
        if own is None:
            del cls._apply  # type: ignore[attr-defined]
        else:
            cls._apply = own  # type: ignore[attr-defined]
    registry.router_classes.clear()
    registry.replacements.clear()
    registry.problems.clear()
    registry.needless.clear()
    registry.notes.clear()
    registry.pending.clear()
