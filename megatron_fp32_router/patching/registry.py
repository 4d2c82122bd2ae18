"""What is patched, and what state each patch is in.

The state is read off Megatron's modules as they are now, and not remembered: somebody else may have replaced our
function since, or reloaded its module.
"""

from __future__ import annotations

import functools
import logging
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Final, Literal

import wrapt

from megatron_fp32_router.errors import Fp32RouterError
from megatron_fp32_router.log import say
from megatron_fp32_router.patching.chain import wrapper_chain
from megatron_fp32_router.patching.owner import HOME, PLACE, home, is_ours, name_of, somebody_elses
from megatron_fp32_router.patching.record import Patch
from megatron_fp32_router.patching.records import PATCHES
from megatron_fp32_router.settings import Settings

State = Literal["armed", "applied", "native", "displaced", "drifted", "off"]

#: Set on every parameter that is kept in fp32, for those who meet it without its model: optimizers.
KEPT: Final = "kept_in_fp32_router"


@dataclass(frozen=True)
class PatchStatus:
    """What status() says about one patch.

    Attributes:
        id: the patch's name.
        target: the dotted name of what it patches.
        state: "armed" (waits for the import), "applied", "native" (this release needs no such patch), "displaced"
            (somebody else's patch sits on ours), "drifted" (the target is not what the patch was written for),
            "off".
        detail: one sentence more, or an empty string.
    """

    id: str
    target: str
    state: State
    detail: str


@dataclass(frozen=True)
class Problem:
    """Why a patch does not fit.

    Attributes:
        says: the end of a sentence about its target.
        missing: whether there is no such function.
        changed: whether it is its source that has changed.
    """

    says: str
    missing: bool = False
    changed: bool = False


@dataclass
class _Registry:
    """The one piece of mutable state. Patched functions read `settings` at call time."""

    active: bool = False
    settings: Settings = field(default_factory=Settings)
    #: patch id -> our replacement, as installed.
    replacements: dict[str, Any] = field(default_factory=dict)
    #: patch id -> why it does not fit.
    problems: dict[str, Problem] = field(default_factory=dict)
    #: patch id -> why this Megatron needs no such patch: seen in its source, or by a patch that is in place.
    needless: dict[str, str] = field(default_factory=dict)
    #: patch id -> what its replacement has to add to status().
    notes: dict[str, set[str]] = field(default_factory=dict)
    #: models that were wrapped and still live.
    models: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    #: modules that were half imported when the plugin was armed.
    pending: set[str] = field(default_factory=set)
    #: a class that protect_router_class was given -> (its own `_apply`, or None where it inherits one; ours).
    router_classes: dict[type, tuple[Any, Any]] = field(default_factory=dict)
    #: modules that were reloaded: their classes are new objects, so they are looked at whenever a model is built.
    reloaded: set[str] = field(default_factory=set)


registry: Final = _Registry()


def replaces(original: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """functools.wraps for replacements: name, docstring and signature, but not the original's attributes.

    A function compiled by torch carries dynamo's own attributes; copied, they would make dynamo run the original
    and skip the replacement.
    """
    return functools.wraps(original, updated=())


def mismatch(error: type[Fp32RouterError], message: str, speaker: int = 0) -> None:
    """Raise `error`, or warn once on one rank where the user chose `warn`."""
    if registry.settings.on_mismatch == "raise":
        raise error(message)
    say(logging.WARNING, message, once=True, speaker=speaker)


def not_asked_for(patch: Patch) -> bool:
    """Whether it is a patch of the monitor, which is off and has not been on."""
    return patch.monitor and not registry.settings.monitor and patch.id not in registry.replacements


def position_of(patch: Patch, module: ModuleType) -> tuple[Literal["outermost", "below", "gone"], str]:
    """Where our replacement is now, and what is outermost there. Patches of this copy that wrap it do not count."""
    replacement = registry.replacements[patch.id]
    try:
        current = wrapt.resolve_path(module, getattr(replacement, PLACE, patch.path))[2]
    except AttributeError:
        return "gone", "nothing"
    position: Literal["outermost", "below"] = "outermost"
    for entry in wrapper_chain(current):
        if entry is replacement:
            return position, name_of(current)
        if not is_ours(entry) or home(entry) != HOME:
            position = "below"
    return "gone", name_of(current)


def left_to_somebody_else(patch: Patch, module: ModuleType) -> bool:
    """Whether to leave the target alone: somebody else had replaced it before the plugin could."""
    try:
        current = wrapt.resolve_path(module, patch.path)[2]
    except AttributeError:
        return False
    return patch.supersedes and not any(is_ours(f) for f in wrapper_chain(current)) and somebody_elses(current)


def _status(patch: Patch) -> tuple[State, str]:
    module = sys.modules.get(patch.module)
    if not registry.active:
        return "off", ""
    if module is None:
        return "armed", "waits for the import"
    if patch.id in registry.problems:
        how = "refused" if registry.settings.on_mismatch == "raise" else "left out with a warning"
        at_use = f"; {how} where it is used" if patch.id in registry.replacements else ""
        return "drifted", f"the target {registry.problems[patch.id].says}{at_use}"
    if patch.module in registry.pending:
        return "armed", "the module is half imported"
    if patch.id not in registry.replacements:
        if patch.id in registry.needless:
            return "native", registry.needless[patch.id]
        if left_to_somebody_else(patch, module):
            name = name_of(wrapt.resolve_path(module, patch.path)[2])
            return "displaced", f"replaced by {name} before the plugin was active"
        return "drifted", "was not applied"
    position, above = position_of(patch, module)
    if position != "outermost":
        return "displaced", f"{'wrapped' if position == 'below' else 'replaced'} by {above}"
    if home(registry.replacements[patch.id]) != HOME:
        return "displaced", f"what runs is from {name_of(registry.replacements[patch.id])}"
    if patch.id in registry.needless:
        return "native", registry.needless[patch.id]
    return "applied", "; ".join(sorted(registry.notes.get(patch.id, ())))


def runs(patch_id: str) -> bool:
    """Whether our function runs in that patch's target: in place, or below somebody else's wrapper."""
    patch = next(patch for patch in PATCHES if patch.id == patch_id)
    module, replacement = sys.modules.get(patch.module), registry.replacements.get(patch_id)
    if module is None or replacement is None or home(replacement) != HOME:
        return False
    return position_of(patch, module)[0] != "gone"


def status() -> tuple[PatchStatus, ...]:
    """The state of every patch, asked of the modules as they are now; the monitor's only where it is on."""
    asked_for = [patch for patch in PATCHES if not not_asked_for(patch)]
    return tuple(PatchStatus(patch.id, patch.target, *_status(patch)) for patch in asked_for)
