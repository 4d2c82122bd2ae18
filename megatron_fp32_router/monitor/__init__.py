"""The monitor: are the routers still what they should be, do updates take effect, is the load even, are choices stable?

MEGATRON_FP32_ROUTER_MONITOR=N looks every N steps, by itself (watch.py); docs/monitor.md has every metric. For a loop
that does not call Megatron's finalize_model_grads, or has a logger of its own:

    from megatron_fp32_router import monitor

    with monitor.listening(model):      # optional: without it there is nothing to say about tokens
        forward_and_backward()
    logger.log(monitor.metrics(model, step))  # a flat dict of numbers

Names are fetched on first use: importing this package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_fp32_router.monitor.own_loop import latest, listening, metrics

__all__ = ["latest", "listening", "metrics"]


def __getattr__(name: str) -> Any:
    """Fetch a public name on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("megatron_fp32_router.monitor.own_loop"), name)
