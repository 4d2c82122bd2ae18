"""Arming: the patches of a Megatron module are applied whenever it is imported, however often that is.

The records say which modules these are. Each has an entry point in the group `megatron_fp32_router.hooks`, which names
`on_import`. Neither torch nor Megatron is imported here: a hook runs when the user's program has imported the module.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Final

import wrapt

from megatron_fp32_router.log import say
from megatron_fp32_router.patching.apply import apply_all, initializing, settle
from megatron_fp32_router.patching.records import PATCHES
from megatron_fp32_router.patching.registry import registry
from megatron_fp32_router.settings import Settings

GROUP: Final = "megatron_fp32_router.hooks"

#: The Megatron modules that patches wait for.
MODULES: Final = tuple(dict.fromkeys(patch.module for patch in PATCHES))

#: Hooks that wrapt holds and has not fired yet.
_waiting: set[str] = set()
#: True while hooks are being registered. A hook that runs now gets a module that may be half imported.
_arming = False


def on_import(module: ModuleType) -> None:
    """What every entry point of the group names: apply the patches of a Megatron module that has been imported."""
    _patch(module, module.__name__)


def _patch(module: ModuleType, name: str) -> None:
    _waiting.discard(name)
    if not registry.active:
        return
    if _arming and initializing(module):
        registry.pending.add(name)
        return
    apply_all(module, name)


class _Watcher:
    """A finder, first on sys.meta_path, that finds nothing: it only sees what is about to be imported.

    wrapt runs a hook once. Without this, a module that is deleted and imported again, that is reloaded, or that was
    half imported when the plugin was armed would stay unpatched, and nobody would notice.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if registry.active:
            settle()
            if fullname in MODULES:
                if fullname in sys.modules:
                    registry.reloaded.add(fullname)
                elif fullname not in _waiting:
                    _register(fullname)
        return None


_watcher: Final = _Watcher()


def _register(name: str) -> None:
    _waiting.add(name)
    wrapt.register_post_import_hook(on_import, name)


@functools.cache
def _discover() -> None:
    """Register the hooks that the installed metadata names, once in a process.

    A checkout on PYTHONPATH has no metadata, and that of an editable install is stale after an edit. So arm() registers
    the modules of the records for which nothing was found here.
    """
    if not hasattr(wrapt, "unwrap_object"):
        return  # before 2.4 it may ask setuptools, which takes long to import; the records name the same modules
    try:
        wrapt.discover_post_import_hooks(GROUP)
    except (ImportError, AttributeError) as error:
        say(
            logging.WARNING,
            f"the installed metadata of megatron-fp32-router is stale ({error}); its records are used instead. "
            "Reinstall the package to get rid of this warning.",
        )
        return
    for entry in importlib.metadata.entry_points(group=GROUP):
        if entry.name in MODULES and entry.value == f"{__name__}:{on_import.__name__}":
            _waiting.add(entry.name)


def arm(settings: Settings) -> None:
    """Turn the plugin on: patch what is imported, and everything else when it is. Idempotent.

    Raises:
        TargetMissingError: a Megatron that is imported already does not fit (under on_mismatch="raise").
    """
    global _arming
    registry.settings = settings
    registry.active = True
    _arming = True
    try:
        _discover()
        for name in MODULES:
            module = sys.modules.get(name)
            if module is not None:
                _patch(module, name)
            elif name not in _waiting:
                _register(name)
    finally:
        _arming = False
    # Only now, when wrapt's own finder is there: ours has to be asked before it, to register in time.
    if _watcher not in sys.meta_path:
        sys.meta_path.insert(0, _watcher)


def disarm() -> None:
    """Take everything back: patches, and the watcher on sys.meta_path. wrapt's waiting hooks stay and do nothing."""
    registry.active = False
    registry.reloaded.clear()
    if _watcher in sys.meta_path:
        sys.meta_path.remove(_watcher)
