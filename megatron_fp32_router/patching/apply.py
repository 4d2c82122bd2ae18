"""Puts patches in place: when Megatron's modules are imported, and later where a module could not be patched then."""

from __future__ import annotations

import inspect
import itertools
import sys
from types import ModuleType
from typing import Any

import wrapt

from megatron_fp32_router.patching.chain import wrapper_chain
from megatron_fp32_router.patching.gate import look
from megatron_fp32_router.patching.megatron import Megatron, of_module
from megatron_fp32_router.patching.owner import HOME, MADE_BY, MARK, PLACE, home, is_ours
from megatron_fp32_router.patching.record import Factory, Function, Needless, Patch
from megatron_fp32_router.patching.records import PATCHES
from megatron_fp32_router.patching.registry import Problem, left_to_somebody_else, not_asked_for, registry, replaces


def initializing(module: ModuleType) -> bool:
    """Whether this module is half imported: Python is still running its code."""
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def apply_all(module: ModuleType, name: str) -> None:
    """Apply every patch whose target lives in `module`. Patches that are in place are left alone.

    Raises:
        TargetMissingError: a target is missing or has another signature (under on_mismatch="raise").
        TargetChangedError: its source, or that of something its patch relies on, is not what the patch was written
            for (likewise).
    """
    megatron = of_module(module)
    patches = [patch for patch in PATCHES if patch.module == name and not not_asked_for(patch)]
    found = {patch.id: look(patch, megatron, registry.settings.accepted) for patch in patches}
    changed = {patch_id: finding.objection for patch_id, finding in found.items() if finding.objection is not None}
    if changed and registry.settings.on_mismatch == "warn":
        from megatron_fp32_router.patching import misfit

        misfit.leave_out_what_is_unsafe_without(changed, patches)
    for patch in patches:
        _apply(patch, module, megatron, changed.get(patch.id), found[patch.id].needless)


def settle() -> None:
    """Patch what could not be patched at once: modules that were half imported, modules that were reloaded."""
    for name in registry.pending | registry.reloaded:
        module = sys.modules.get(name)
        if module is None or not initializing(module):
            registry.pending.discard(name)
            if module is not None and registry.active:
                apply_all(module, name)


def _problem(patch: Patch, module: ModuleType, changed: str | None) -> Problem | None:
    """What of the target is not as the patch expects, or None.

    Args:
        changed: what the gate found wrong with its source, or None.
    """
    class_name, _, name = patch.path.rpartition(".")
    owner = getattr(module, class_name, None) if class_name else module
    if owner is None or not (patch.inherited or name in vars(owner)):
        return Problem("does not exist", missing=True)
    target = wrapt.resolve_path(module, patch.path)[2]
    try:
        signature = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return Problem("has no readable signature")
    found = [parameter.name for parameter in signature]
    # Somebody else's wrapper may take (self, *args, **kwargs) and hand on what it gets.
    named = list(itertools.takewhile(lambda parameter: parameter.kind is not parameter.VAR_POSITIONAL, signature))
    needed = patch.signature[: len(named)] if len(named) < len(found) else patch.signature
    if tuple(found[: len(needed)]) != needed:
        return Problem(f"takes ({', '.join(found)}) where ({', '.join(patch.signature)}, …) was expected")
    return None if changed is None else Problem(changed, changed=True)


def _apply(
    patch: Patch, module: ModuleType, megatron: Megatron, changed: str | None, needless: Needless | None
) -> None:
    registry.problems.pop(patch.id, None)
    problem = None
    if needless != "native":
        if left_to_somebody_else(patch, module):
            return  # status() says so, and a line in the log when a model is wrapped
        problem = _problem(patch, module, changed)
    if needless == "native" or (needless == "absent" and problem is not None and problem.missing):
        registry.needless[patch.id] = f"{megatron} {patch.why_needless(needless)}"
    elif problem is None:
        _put_in_place(patch, module)
    else:
        from megatron_fp32_router.patching import misfit

        registry.problems[patch.id] = problem
        refusal = misfit.refuse(patch, module, megatron, problem)
        if refusal is not None:
            _install(patch, module, *refusal, made_by="")


def _put_in_place(patch: Patch, module: ModuleType) -> None:
    """Install what its factory makes, unless the patch is in place already, possibly below somebody else's wrapper.

    It is in place where the hook ran before, or where the name was imported from a module that is patched.
    """
    for entry in wrapper_chain(wrapt.resolve_path(module, patch.path)[2]):
        if is_ours(entry) and getattr(entry, MADE_BY, None) == patch.made_by:
            _remember(patch, entry)
            return
    factory = patch.factory if patch.at_once else _when_called(patch.factory)
    _install(patch, module, patch.path, factory, patch.made_by)


def _when_called(factory: Factory) -> Factory:
    """`factory`, called when the target is first called: a job imports only the repairs of what it uses."""

    def put_off(original: Function) -> Function:
        made: Function | None = None

        @replaces(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            made = made or factory(original)
            return made(*args, **kwargs)

        return replacement

    return put_off


def _install(patch: Patch, module: ModuleType, path: str, factory: Factory, made_by: str) -> None:
    """Put what `factory` makes of the function at `path` in its place."""

    def make(original: Function) -> Function:
        replacement = factory(original)
        setattr(replacement, MARK, replacement)
        setattr(replacement, MADE_BY, made_by)
        setattr(replacement, PLACE, path)
        return replacement

    # A plain closure, not a FunctionWrapper: torch.compile silently skips the latter.
    wrap: Any = wrapt.wrap_object  # typed for wrapt's own proxies only
    _remember(patch, wrap(module, path, make))


def _remember(patch: Patch, replacement: Any) -> None:
    """Note what is in place for a patch, and warn where another copy of the plugin has made it."""
    registry.replacements[patch.id] = replacement
    if home(replacement) != HOME:
        from megatron_fp32_router.patching import misfit

        misfit.warn_of_another_copy(replacement, HOME)
