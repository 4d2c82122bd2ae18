"""The monitor for programs that look when they want to: one function that returns a flat dict."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch

from megatron_fp32_router.monitor import look, watch, writers
from megatron_fp32_router.monitor.sinks import Layer
from megatron_fp32_router.patching.registry import registry

#: By router, not by layer: a teacher has a layer 1 as well.
_heard: WeakKeyDictionary[Any, look.Listener] = WeakKeyDictionary()
_memory: WeakKeyDictionary[Any, look.Memory] = WeakKeyDictionary()


@contextlib.contextmanager
def listening(model: Any) -> Iterator[None]:
    """Note a sample of the tokens that the routers of `model` are given inside, for the next metrics().

    Args:
        model: a torch.nn.Module, or a list of model chunks.
    """
    layers = look.layers_of(model)
    listeners = look.listen(layers, samples=True)
    _heard.update({layers[layer][1]: listener for layer, listener in listeners.items()})
    try:
        yield
    finally:
        for listener in listeners.values():
            listener.remove()


def metrics(model: Any, step: int | None = None) -> dict[str, float]:
    """Look at the routers of `model` now. This rank's layers only; no collective, and no error for what it finds.

    Args:
        model: a torch.nn.Module, or a list of model chunks.
        step: of the training, as you count it. Without it bias/drift_per_step is left out, and bias/steps_to_blind_*
            where it depends on the drift: how many steps lie between two calls only you know.

    Returns:
        `layer_3/precision/weight_bits`, `all/bias/spread/max` and so on, as docs/monitor.md lists them, and
        `violations`, how many promises are broken (latest() of the automatic monitor raises instead). Numbers about
        tokens are there after listening(); load is that of this rank's tokens since the last balance update.
        update/* needs the update itself and is left to the automatic monitor.
    """
    seen: dict[Layer, look.Seen] = {}
    with torch.no_grad():
        for layer, (name, router) in look.layers_of(model).items():
            memory = _memory.setdefault(router, look.Memory())
            seen[layer] = look.see(name, router, _heard.pop(router, None), True, memory)
    look.read(seen.values())
    entries = {layer: look.entry(each, _memory[each.router], step) for layer, each in seen.items()}
    look.count_own(entries, seen)
    return writers.flat(entries)


def latest() -> dict[str, float]:
    """The last look of the automatic monitor as a flat dict: all layers on rank 0, this rank's own elsewhere.

    Empty before the first look, and where MEGATRON_FP32_ROUTER_MONITOR is off.
    """
    on = registry.active and registry.settings.monitor
    return writers.flat(watch.current.entries) if on and watch.current.entries else {}
