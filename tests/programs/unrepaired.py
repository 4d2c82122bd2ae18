"""The plugin's casts without its repairs of optimizers: what upstream alone does with fp32 router parameters."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator

import wrapt

import megatron_fp32_router
from megatron_fp32_router.patching.chain import unwrap
from megatron_fp32_router.patching.records import PATCHES
from megatron_fp32_router.patching.registry import registry


@contextlib.contextmanager
def only_casts() -> Iterator[None]:
    """Everything on but what `optimizers/` holds; everything off afterwards."""
    megatron_fp32_router.disable()
    # What is imported only later would be patched then.
    for name in {patch.module for patch in PATCHES if patch.mechanism.startswith("optimizers.")}:
        with contextlib.suppress(ModuleNotFoundError):  # older releases lack some
            importlib.import_module(name)
    megatron_fp32_router.enable()
    for patch in reversed(PATCHES):  # of two that share a target, the later one lies on the other
        if patch.mechanism.startswith("optimizers.") and patch.id in registry.replacements:
            unwrap(sys.modules[patch.module], patch.path, registry.replacements[patch.id])
    try:
        yield
    finally:
        megatron_fp32_router.disable()


@contextlib.contextmanager
def upstreams(identifier: str) -> Iterator[None]:
    """One patch of the plugin taken off, the others left on."""
    patch = next(patch for patch in PATCHES if patch.id == identifier)
    module = importlib.import_module(patch.module)  # which patches it
    ours = registry.replacements[identifier]
    owner, name, _ = wrapt.resolve_path(module, patch.path)
    setattr(owner, name, ours.__wrapped__)
    try:
        yield
    finally:
        setattr(owner, name, ours)
