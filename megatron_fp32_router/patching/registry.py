"""Applying patches, taking them back, and saying truthfully what state each is in.

What is patched is asked of the modules as they are now, never remembered: somebody else may have replaced our
function, or reloaded its module, since.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import shlex
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal

import wrapt

from megatron_fp32_router.errors import DisplacedPatchError, Fp32RouterError, TargetChangedError, TargetMissingError
from megatron_fp32_router.log import say
from megatron_fp32_router.patching.gate import look
from megatron_fp32_router.patching.megatron import Megatron, of_module
from megatron_fp32_router.patching.owner import HOME, MADE_BY, MARK, PLACE, home, is_ours, name_of, somebody_elses
from megatron_fp32_router.patching.record import USUAL, Function, Needless, Patch
from megatron_fp32_router.patching.records import PATCHES
from megatron_fp32_router.settings import PREFIX, Settings

if not hasattr(wrapt, "unwrap_object"):
    raise Fp32RouterError(
        f"megatron-fp32-router needs wrapt>=2.4,<3; found {getattr(wrapt, '__version__', '?')} at {wrapt.__file__}. "
        f"Install it with: {sys.executable} -m pip install 'wrapt>=2.4,<3'"
    )

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
    say(logging.WARNING, message, threshold=registry.settings.log, once=True, speaker=speaker)


def initializing(module: ModuleType) -> bool:
    """Whether the import system is still executing this module."""
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def apply_all(module: ModuleType, name: str) -> None:
    """Apply every patch whose target lives in `module`. Patches that are in place are left alone.

    Raises:
        TargetMissingError: a target is missing or has another signature (under on_mismatch="raise").
        TargetChangedError: its source, or that of something its patch relies on, is not what the patch was written
            for (likewise).
    """
    megatron = of_module(module)
    patches = [patch for patch in PATCHES if patch.module == name and not _not_asked_for(patch)]
    found = {patch.id: look(patch, megatron, registry.settings.accepted) for patch in patches}
    changed = {patch_id: finding.objection for patch_id, finding in found.items() if finding.objection is not None}
    if registry.settings.on_mismatch == "warn":
        # Also skip patches that are unsafe without a skipped one.
        for _ in patches:
            for patch in patches:
                missing = next((needed for needed in patch.needs if needed in changed and _is_core(needed)), None)
                if missing is not None:
                    changed.setdefault(patch.id, f"is left alone, because its patch does harm without {missing!r},")
    for patch in patches:
        _apply(patch, module, megatron, changed.get(patch.id), found[patch.id].needless)


def _is_core(patch_id: str) -> bool:
    """Whether that patch has to fit when Megatron is imported; others stop only what uses them."""
    return any(patch.area == "router" for patch in PATCHES if patch.id == patch_id)


def settle() -> None:
    """Patch what could not be patched at once: modules that were half imported, modules that were reloaded."""
    for name in list(registry.pending):
        module = sys.modules.get(name)
        if module is None or not initializing(module):
            registry.pending.discard(name)
            if module is not None and registry.active:
                apply_all(module, name)
    for name in list(registry.reloaded):
        module = sys.modules.get(name)
        if module is not None and registry.active:
            apply_all(module, name)


def _not_asked_for(patch: Patch) -> bool:
    return patch.monitor and not registry.settings.monitor and patch.id not in registry.replacements


def _problem(patch: Patch, module: ModuleType, changed: str | None) -> Problem | None:
    """What about the target is not as the patch expects, or None.

    Args:
        changed: what the gate has against its source.
    """
    parts = patch.path.split(".")
    owner: Any = module
    for part in parts[:-1]:
        owner = getattr(owner, part, None)
    own = vars(owner) if owner is not None else {}
    if not (patch.inherited and owner is not None) and parts[-1] not in own:
        return Problem("does not exist", missing=True)
    target = wrapt.resolve_path(module, patch.path)[2]
    try:
        signature = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return Problem("has no readable signature")
    found = [parameter.name for parameter in signature]
    # Somebody else's wrapper may take (self, *args, **kwargs) and hand on what it gets.
    named = list(itertools.takewhile(lambda parameter: parameter.kind is not parameter.VAR_POSITIONAL, signature))
    needed = patch.parameters[: len(named)] if len(named) < len(found) else patch.parameters
    if tuple(found[: len(needed)]) != needed:
        return Problem(f"takes ({', '.join(found)}) where ({', '.join(patch.parameters)}, …) was expected")
    return None if changed is None else Problem(changed, changed=True)


def _apply(
    patch: Patch, module: ModuleType, megatron: Megatron, changed: str | None, needless: Needless | None
) -> None:
    registry.problems.pop(patch.id, None)
    if needless == "native":
        registry.needless[patch.id] = f"{megatron} {patch.why_needless(needless)}"
        return
    if _left_to_somebody_else(patch, module):
        return  # status() says so, and a line in the log when a model is wrapped
    problem = _problem(patch, module, changed)
    if problem is not None and problem.missing and needless == "absent":
        registry.needless[patch.id] = f"{megatron} {patch.why_needless(needless)}"
        return
    error, accepting = TargetMissingError, ""
    if problem is not None and problem.changed:
        error = TargetChangedError
    if error is TargetChangedError and megatron.path is not None:
        file = str(Path(registry.settings.accepted or "megatron_fp32_router.accepted.json").absolute())
        tree = str(megatron.path).removesuffix("/megatron/core")
        command = [sys.executable, "-m", "megatron_fp32_router", "check", "--megatron", tree, "--accept", file]
        command += [] if patch.area in USUAL else ["--for", ",".join((*USUAL, patch.area))]
        accepting = (
            f"To keep this Megatron, run `{shlex.join(command)}`: it shows the change, trains a tiny model on it, and "
            f"writes {file} if the plugin works there. Then train with {PREFIX}_ACCEPTED={shlex.quote(file)}. Or "
        )
    if problem is not None:
        registry.problems[patch.id] = problem
        if not patch.essential:
            # Nothing is wrong without it: that is no reason to stop a training.
            say(
                logging.WARNING,
                f"{patch.target} {problem.says} in {megatron}; without the patch {patch.id!r} {patch.why}.",
                threshold=registry.settings.log,
                once=True,
            )
            return
        message = (
            f"{patch.target} {problem.says} in {megatron} ({megatron.path}); the patch {patch.id!r} was written for "
            f"it. Without that patch {patch.why}. {accepting or 'Either '}use a release that the plugin knows, or set "
            f"{PREFIX}_ON_MISMATCH=warn to train with this unprotected, or {PREFIX}=0 to train without the plugin."
        )
        place = patch.path if patch.area != "router" else None
        if place is not None and problem.missing:
            # The function may have another name now; whoever builds its class meets the error there.
            owner = getattr(module, patch.path.partition(".")[0], None)
            place = f"{owner.__name__}.__init__" if isinstance(owner, type) and "__init__" in vars(owner) else None
        if place is None:
            mismatch(error, message)
        elif registry.replacements.get(patch.id) not in wrapt.wrapper_chain(wrapt.resolve_path(module, place)[2]):
            _install(patch, module, place, functools.partial(_refuse_where_used, error=error, message=message))
        return
    current = wrapt.resolve_path(module, patch.path)[2]
    for entry in wrapt.wrapper_chain(current):
        if is_ours(entry) and getattr(entry, MADE_BY, None) == patch.made_by:
            # In place already, maybe below somebody else's: the hook fired twice, or the name was imported from a
            # module that is patched.
            _remember(patch, entry)
            return
    _install(patch, module, patch.path, patch.factory)


def _install(patch: Patch, module: ModuleType, path: str, factory: Callable[[Function], Function]) -> None:
    """Put what `factory` makes of the function at `path` in its place."""

    def make(original: Function) -> Function:
        replacement = factory(original)
        setattr(replacement, MARK, replacement)
        setattr(replacement, MADE_BY, patch.made_by if factory is patch.factory else "")
        setattr(replacement, PLACE, path)
        return replacement

    # A plain closure, not a FunctionWrapper: torch.compile silently skips the latter.
    wrap: Any = wrapt.wrap_object  # typed for wrapt's own proxies only
    _remember(patch, wrap(module, path, make))


def _remember(patch: Patch, replacement: Any) -> None:
    """Keep what is in place for a patch; say so when it is another copy of the plugin that made it."""
    registry.replacements[patch.id] = replacement
    if home(replacement) != HOME:
        say(
            logging.WARNING,
            f"{name_of(replacement)} patches this Megatron too, and its functions run, not those in {HOME}. "
            f"Remove one of the two: `{sys.executable} -m megatron_fp32_router doctor` names them.",
            threshold=registry.settings.log,
            once=True,
        )


def _refuse_where_used(original: Function, error: type[Fp32RouterError], message: str) -> Function:
    """In the place of a function that has changed: an error if a model with fp32 router parameters is in this process.

    Raises:
        TargetChangedError: there is such a model (under on_mismatch="raise").
    """

    @replaces(original)
    def refused(*args: Any, **kwargs: Any) -> Any:
        if any(hasattr(parameter, KEPT) for model in registry.models for parameter in model.parameters()):
            mismatch(error, message)
        return original(*args, **kwargs)

    return refused


def _position(patch: Patch, module: ModuleType) -> tuple[Literal["outermost", "below", "gone"], str]:
    """Where our replacement sits now, and who sits in its place. Another one of this copy on it does not count."""
    replacement = registry.replacements[patch.id]
    try:
        current = wrapt.resolve_path(module, getattr(replacement, PLACE, patch.path))[2]
    except wrapt.PathResolutionError:
        return "gone", "nothing"
    above = name_of(current)
    for entry in wrapt.wrapper_chain(current):
        if entry is replacement:
            return "outermost", ""
        if not is_ours(entry) or home(entry) != HOME:
            break
    if any(entry is replacement for entry in wrapt.wrapper_chain(current)):
        return "below", above
    return "gone", above


def _left_to_somebody_else(patch: Patch, module: ModuleType) -> bool:
    """Whether we keep our hands off: the target had been replaced before the plugin could."""
    try:
        current = wrapt.resolve_path(module, patch.path)[2]
    except wrapt.PathResolutionError:
        return False
    return patch.supersedes and not any(is_ours(f) for f in wrapt.wrapper_chain(current)) and somebody_elses(current)


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
            position, above = _position(patch, module)
            if position == "below":
                raise DisplacedPatchError(
                    f"{patch.target} has been wrapped by {above} since; take that off first, then disable()"
                )
            if position == "outermost":
                placed.append((patch, module))
    # Backwards: of two that share a target, the later one lies on the other.
    for patch, module in reversed(placed):
        replacement = registry.replacements[patch.id]
        wrapt.unwrap_object(module, getattr(replacement, PLACE, patch.path), replacement)
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
        if _left_to_somebody_else(patch, module):
            name = name_of(wrapt.resolve_path(module, patch.path)[2])
            return "displaced", f"replaced by {name} before the plugin was active"
        return "drifted", "was not applied"
    position, above = _position(patch, module)
    if position == "outermost" and home(registry.replacements[patch.id]) != HOME:
        return "displaced", f"what runs is of {name_of(registry.replacements[patch.id])}"
    if position == "outermost":
        if patch.id in registry.needless:
            return "native", registry.needless[patch.id]
        return "applied", "; ".join(sorted(registry.notes.get(patch.id, ())))
    verb = "wrapped" if position == "below" else "replaced"
    return "displaced", f"{verb} by {above}"


def runs(patch_id: str) -> bool:
    """Whether our function runs in that patch's target: in place, or below somebody else's wrapper."""
    patch = next(patch for patch in PATCHES if patch.id == patch_id)
    module = sys.modules.get(patch.module)
    replacement = registry.replacements.get(patch_id)
    if module is None or replacement is None or home(replacement) != HOME:
        return False
    return _position(patch, module)[0] != "gone"


def status() -> tuple[PatchStatus, ...]:
    """The state of every patch, asked of the modules as they are now; the monitor's only where it is on."""
    asked_for = [patch for patch in PATCHES if not _not_asked_for(patch)]
    return tuple(PatchStatus(patch.id, patch.target, *_status(patch)) for patch in asked_for)
