"""A patch that does not fit this Megatron, or that another copy of the plugin has made: messages, and what is stopped.

Imported only where there is such a patch.
"""

from __future__ import annotations

import functools
import logging
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import wrapt

from megatron_fp32_router.errors import Fp32RouterError, TargetChangedError, TargetMissingError
from megatron_fp32_router.log import say
from megatron_fp32_router.patching.chain import wrapper_chain
from megatron_fp32_router.patching.megatron import Megatron
from megatron_fp32_router.patching.owner import name_of
from megatron_fp32_router.patching.record import USUAL, Factory, Function, Patch
from megatron_fp32_router.patching.records import PATCHES
from megatron_fp32_router.patching.registry import KEPT, Problem, mismatch, registry, replaces
from megatron_fp32_router.settings import PREFIX


def leave_out_what_is_unsafe_without(changed: dict[str, str], patches: Iterable[Patch]) -> None:
    """Also leave out the patches that are unsafe without one that is in `changed`: add them to it.

    Only where that one is a patch of the router. Any other one stops whatever uses its target.
    """
    core = {patch.id for patch in PATCHES if patch.area == "router"}
    waiting = [patch for patch in patches if patch.id not in changed]
    while found := [(patch, needed) for patch in waiting for needed in patch.needs if needed in changed.keys() & core]:
        for patch, needed in found:
            changed.setdefault(patch.id, f"is not patched, because its patch is unsafe without {needed!r},")
        waiting = [patch for patch in waiting if patch.id not in changed]


def warn_of_another_copy(replacement: Any, home: Path) -> None:
    """Warn once that another copy's functions run, and not those of the plugin in `home`."""
    say(
        logging.WARNING,
        f"{name_of(replacement)} patches this Megatron too, and its functions run, not those in {home}. "
        f"Remove one of the two: `{sys.executable} -m megatron_fp32_router doctor` names them.",
        once=True,
    )


def refuse(patch: Patch, module: ModuleType, megatron: Megatron, problem: Problem) -> tuple[str, Factory] | None:
    """Stop the program; or return a place in the module and a factory for it, so that using the target stops it.

    Raises:
        TargetMissingError: a target that every job uses is missing or has another signature
            (under on_mismatch="raise").
        TargetChangedError: its source has changed (likewise).
    """
    if not patch.essential:
        # A training is right without it: no reason to stop.
        say(
            logging.WARNING,
            f"{patch.target} {problem.says} in {megatron}; without the patch {patch.id!r} {patch.why}.",
            once=True,
        )
        return None
    error, accepting = TargetMissingError, "Either "
    if problem.changed:
        error = TargetChangedError
        accepting = accepting if megatron.path is None else _how_to_accept(patch, megatron)
    message = (
        f"{patch.target} {problem.says} in {megatron} ({megatron.path}); the patch {patch.id!r} was written for "
        f"it. Without that patch {patch.why}. {accepting}use a release that the plugin knows, or set "
        f"{PREFIX}_ON_MISMATCH=warn to train with this unprotected, or {PREFIX}=0 to train without the plugin."
    )
    place = None if patch.area == "router" else _place_of_use(patch, module, problem)
    if place is None:
        mismatch(error, message)
    elif registry.replacements.get(patch.id) not in wrapper_chain(wrapt.resolve_path(module, place)[2]):
        return place, functools.partial(_refuse_where_used, error=error, message=message)
    return None


def _how_to_accept(patch: Patch, megatron: Megatron) -> str:
    file = str(Path(registry.settings.accepted or "megatron_fp32_router.accepted.json").absolute())
    tree = str(megatron.path).removesuffix("/megatron/core")
    command = [sys.executable, "-m", "megatron_fp32_router", "check", "--megatron", tree, "--accept", file]
    command += [] if patch.area in USUAL else ["--for", ",".join((*USUAL, patch.area))]
    return (
        f"To keep this Megatron, run `{shlex.join(command)}`: it shows the change, trains a tiny model on it, and "
        f"writes {file} if the plugin works there. Then train with {PREFIX}_ACCEPTED={shlex.quote(file)}. Or "
    )


def _place_of_use(patch: Patch, module: ModuleType, problem: Problem) -> str | None:
    """A function that every user of the target calls; None if the module has none."""
    if not problem.missing:
        return patch.path
    # The function may have been renamed. Then the error comes when its class is built.
    owner = getattr(module, patch.path.partition(".")[0], None)
    return f"{owner.__name__}.__init__" if isinstance(owner, type) and "__init__" in vars(owner) else None


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
