"""The monitor for programs that look when they want to: one function that returns a flat dict."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from megatron_fp32_router.monitor import look, sinks, watch
from megatron_fp32_router.monitor.load import load
from megatron_fp32_router.monitor.sinks import Layer
from megatron_fp32_router.registry import registry

_heard: dict[Layer, look.Listener] = {}
_memory: dict[Layer, look.Memory] = {}
_calls = 0


@contextlib.contextmanager
def listening(model: Any) -> Iterator[None]:
    """Note a sample of the tokens that the routers of `model` are given inside, for the next metrics().

    Args:
        model: a torch.nn.Module, or a list of model chunks.
    """
    _heard.clear()
    _heard.update(look.listen(look.layers_of(model), samples=True))
    listeners = list(_heard.values())
    try:
        yield
    finally:
        for listener in listeners:
            listener.remove()


def metrics(model: Any) -> dict[str, float]:
    """Look at the routers of `model` now. This rank's layers only; no collective, and no error for what it finds.

    Args:
        model: a torch.nn.Module, or a list of model chunks.

    Returns:
        `layer_3/precision/weight_bits`, `all/bias/spread/max` and so on, as docs/monitor.md lists them, and
        `violations`, how many promises are broken (latest() of the automatic monitor raises instead). Numbers about
        tokens are there after listening(); load is that of this rank's tokens since the last balance update.
        update/* needs the update itself and is left to the automatic monitor.
    """
    global _calls
    _calls += 1
    seen = {}
    with torch.no_grad():
        for layer, (name, router) in look.layers_of(model).items():
            memory = _memory.setdefault(layer, look.Memory())
            seen[layer] = look.see(name, router, _heard.get(layer), True, memory)
    _heard.clear()
    look.read(seen.values())
    entries = {layer: look.entry(each, _memory[layer], _calls) for layer, each in seen.items()}
    for layer, each in seen.items():
        if each.local_E is not None:
            entries[layer]["metrics"] |= load(each.local_E.tolist())
    return sinks.flat(entries)


def latest() -> dict[str, float]:
    """The last look of the automatic monitor as a flat dict: all layers on rank 0, this rank's own elsewhere.

    Empty before the first look, and where MEGATRON_FP32_ROUTER_MONITOR is off.
    """
    on = registry.active and registry.settings.monitor
    return sinks.flat(watch.current.entries) if on and watch.current.entries else {}
