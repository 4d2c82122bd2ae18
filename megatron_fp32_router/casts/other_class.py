"""protect_router_class(): routers that are not built on Megatron's. Imported only when it is called."""

from __future__ import annotations

import sys

import torch

from megatron_fp32_router.casts.router import keep_fp32
from megatron_fp32_router.patching.record import ROUTER
from megatron_fp32_router.patching.registry import registry


def protect_class(cls: type[torch.nn.Module]) -> None:
    """See megatron_fp32_router.protect_router_class."""
    upstream = sys.modules.get(ROUTER)
    if cls in registry.router_classes or (upstream is not None and issubclass(cls, upstream.TopKRouter)):
        return
    ours = keep_fp32(cls._apply)
    registry.router_classes[cls] = (vars(cls).get("_apply"), ours)
    cls._apply = ours  # type: ignore[method-assign]
