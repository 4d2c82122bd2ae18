"""Arming: which Megatron module wakes which patches, whenever and however often it is imported.

The functions `on_…` are entry points of the group `megatron_fp32_router.hooks`. Neither torch nor Megatron is
imported here; a hook runs when the user's own program has imported the module.
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Final

import wrapt

from megatron_fp32_router.registry import apply_all, initializing, registry, settle
from megatron_fp32_router.say import say
from megatron_fp32_router.settings import Settings

GROUP: Final = "megatron_fp32_router.hooks"

#: Hooks that wrapt holds and has not fired yet.
_waiting: set[str] = set()
#: True while hooks are being registered: one that fires now was handed a module as it is, maybe half imported.
_arming = False
_discovered = False


def _wake(name: str, module: ModuleType) -> None:
    _waiting.discard(name)
    if not registry.active:
        return
    if _arming and initializing(module):
        registry.pending.add(name)
        return
    apply_all(module, name)


def on_router(module: ModuleType) -> None:
    """megatron.core.transformer.moe.router: casts, gating, counting."""
    _wake("megatron.core.transformer.moe.router", module)


def on_moe_utils(module: ModuleType) -> None:
    """megatron.core.transformer.moe.moe_utils: the balance rule."""
    _wake("megatron.core.transformer.moe.moe_utils", module)


def on_finalize_model_grads(module: ModuleType) -> None:
    """megatron.core.distributed.finalize_model_grads: the balance update."""
    _wake("megatron.core.distributed.finalize_model_grads", module)


def on_module(module: ModuleType) -> None:
    """megatron.core.transformer.module: the look after wrapping."""
    _wake("megatron.core.transformer.module", module)


def on_distributed_data_parallel(module: ModuleType) -> None:
    """megatron.core.distributed.distributed_data_parallel: groups of buckets, agreement between ranks."""
    _wake("megatron.core.distributed.distributed_data_parallel", module)


def on_dist_checkpointing(module: ModuleType) -> None:
    """megatron.core.dist_checkpointing, the package: the name that programs call."""
    _wake("megatron.core.dist_checkpointing", module)


def on_serialization(module: ModuleType) -> None:
    """megatron.core.dist_checkpointing.serialization: loading."""
    _wake("megatron.core.dist_checkpointing.serialization", module)


def on_distrib_optimizer(module: ModuleType) -> None:
    """megatron.core.optimizer.distrib_optimizer: its checkpoints."""
    _wake("megatron.core.optimizer.distrib_optimizer", module)


def on_optimizer(module: ModuleType) -> None:
    """megatron.core.optimizer.optimizer: checkpoints, refusals, agreement between ranks, the monitor."""
    _wake("megatron.core.optimizer.optimizer", module)


def on_hybrid_optimizer(module: ModuleType) -> None:
    """megatron.core.optimizer.cpu_offloading.hybrid_optimizer: CPU offload."""
    _wake("megatron.core.optimizer.cpu_offloading.hybrid_optimizer", module)


def on_layer_wise_optimizer(module: ModuleType) -> None:
    """megatron.core.optimizer.layer_wise_optimizer: refused."""
    _wake("megatron.core.optimizer.layer_wise_optimizer", module)


def on_torch_fsdp2(module: ModuleType) -> None:
    """megatron.core.distributed.torch_fully_sharded_data_parallel: refused."""
    _wake("megatron.core.distributed.torch_fully_sharded_data_parallel", module)


def on_custom_fsdp(module: ModuleType) -> None:
    """megatron.core.distributed.custom_fsdp.fully_sharded_data_parallel: refused until it has been tried."""
    _wake("megatron.core.distributed.custom_fsdp.fully_sharded_data_parallel", module)


def on_megatron_fsdp(module: ModuleType) -> None:
    """megatron.core.distributed.fsdp.mcore_fsdp_adapter: refused until it has been tried."""
    _wake("megatron.core.distributed.fsdp.mcore_fsdp_adapter", module)


def on_refit_planner(module: ModuleType) -> None:
    """megatron.core.resharding.planner: refit compares dtypes."""
    _wake("megatron.core.resharding.planner", module)


def on_schedules(module: ModuleType) -> None:
    """megatron.core.pipeline_parallel.schedules: what a step is, for splits of router weights."""
    _wake("megatron.core.pipeline_parallel.schedules", module)


def on_legacy_module(module: ModuleType) -> None:
    """megatron.legacy.model.module, which 0.11's own training wraps with; no wheel contains it."""
    _wake("megatron.legacy.model.module", module)


#: The same table as the entry points in pyproject.toml.
HOOKS: Final[dict[str, Callable[[ModuleType], None]]] = {
    "megatron.core.dist_checkpointing": on_dist_checkpointing,
    "megatron.core.dist_checkpointing.serialization": on_serialization,
    "megatron.core.distributed.custom_fsdp.fully_sharded_data_parallel": on_custom_fsdp,
    "megatron.core.distributed.distributed_data_parallel": on_distributed_data_parallel,
    "megatron.core.distributed.finalize_model_grads": on_finalize_model_grads,
    "megatron.core.distributed.fsdp.mcore_fsdp_adapter": on_megatron_fsdp,
    "megatron.core.distributed.torch_fully_sharded_data_parallel": on_torch_fsdp2,
    "megatron.core.optimizer.cpu_offloading.hybrid_optimizer": on_hybrid_optimizer,
    "megatron.core.optimizer.distrib_optimizer": on_distrib_optimizer,
    "megatron.core.optimizer.layer_wise_optimizer": on_layer_wise_optimizer,
    "megatron.core.optimizer.optimizer": on_optimizer,
    "megatron.core.resharding.planner": on_refit_planner,
    "megatron.core.pipeline_parallel.schedules": on_schedules,
    "megatron.core.transformer.module": on_module,
    "megatron.core.transformer.moe.moe_utils": on_moe_utils,
    "megatron.core.transformer.moe.router": on_router,
    "megatron.legacy.model.module": on_legacy_module,
}


class _Watcher:
    """Sits first on sys.meta_path and finds nothing; it only sees what is about to be imported.

    wrapt fires a hook once. A module that is deleted and imported again, reloaded, or was half imported when the
    plugin was armed would otherwise stay unpatched without anybody noticing.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if registry.active:
            settle()
            if fullname in HOOKS:
                if fullname in sys.modules:
                    registry.reloaded.add(fullname)
                elif fullname not in _waiting:
                    _register(fullname)
        return None


_watcher: Final = _Watcher()


def _register(name: str) -> None:
    _waiting.add(name)
    wrapt.register_post_import_hook(HOOKS[name], name)


def _discover() -> None:
    """Register the hooks that the installed metadata names.

    Metadata is absent in a checkout on PYTHONPATH and stale after an edit in an editable install, so what it names
    is compared with the table above, and what is missing or stale is registered from there.
    """
    global _discovered
    if _discovered:
        return
    _discovered = True
    try:
        wrapt.discover_post_import_hooks(GROUP)
    except (ImportError, AttributeError) as error:
        say(
            logging.WARNING,
            f"the installed metadata of megatron-fp32-router is stale ({error}); its own table is used instead. "
            "Reinstall the package to be rid of this line.",
        )
        return
    for entry in importlib.metadata.entry_points(group=GROUP):
        hook = HOOKS.get(entry.name)
        if hook is not None and entry.value == f"{hook.__module__}:{hook.__name__}":
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
        for name in HOOKS:
            module = sys.modules.get(name)
            if module is None:
                if name not in _waiting:
                    _register(name)
            elif initializing(module):
                registry.pending.add(name)
            else:
                _waiting.discard(name)
                apply_all(module, name)
    finally:
        _arming = False
    # After wrapt's own finder exists, so that ours is asked before it and can register in time.
    if _watcher not in sys.meta_path:
        sys.meta_path.insert(0, _watcher)


def disarm() -> None:
    """Take everything back: patches, and the watcher on sys.meta_path. wrapt's waiting hooks stay and do nothing."""
    registry.active = False
    registry.reloaded.clear()
    if _watcher in sys.meta_path:
        sys.meta_path.remove(_watcher)
