"""protect_router_class(): routers that are not built on Megatron's. Imported only when it is called."""

from __future__ import annotations

import logging
import sys

import torch

from megatron_fp32_router.casts.router import keep_fp32
from megatron_fp32_router.log import say
from megatron_fp32_router.patching.record import ROUTER
from megatron_fp32_router.patching.registry import registry


def protect_class(cls: type[torch.nn.Module]) -> None:
    """See megatron_fp32_router.protect_router_class."""
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        raise TypeError(f"protect_router_class() takes a subclass of torch.nn.Module; found {cls!r}")
    if not registry.active:
        say(logging.WARNING, f"the plugin is off: {cls.__module__}.{cls.__qualname__} is not protected", once=True)
        return
    upstream = sys.modules.get(ROUTER)
    if cls in registry.router_classes or (upstream is not None and issubclass(cls, upstream.TopKRouter)):
        return
    ours = keep_fp32(cls._apply)
    registry.router_classes[cls] = (vars(cls).get("_apply"), ours)
    cls._apply = ours  # type: ignore[method-assign]
