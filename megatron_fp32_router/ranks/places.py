"""Where ranks compare what they run: before any collective that a difference could hang.

A process that trains alone has no other rank to compare with, and imports only this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_fp32_router.patching.registry import registry, replaces


def is_alone() -> bool:
    """Whether this process is the only rank of its job."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1


def agree(anew: bool = False) -> None:
    """See agreement.agree()."""
    if not is_alone():
        from megatron_fp32_router.ranks import agreement

        agreement.agree(anew)


def publish_when_wrapping(original: Callable[..., None]) -> Callable[..., None]:
    """DistributedDataParallel.__init__: this rank has a model now, whatever its precision, and says so.

    With NCCL's user buffers the constructor runs collectives, one for each buffer, to warm up. There the ranks agree
    before it.
    """

    @replaces(original)
    def __init__(self: Any, config: Any, ddp_config: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        registry.models.add(module)
        if not is_alone():
            from megatron_fp32_router.ranks import agreement

            agreement.publish(module, *args, *kwargs.values())
        if getattr(ddp_config, "nccl_ub", False):
            agree(anew=True)
        original(self, config, ddp_config, module, *args, **kwargs)

    return __init__


def agree_first(original: Callable[..., Any]) -> Callable[..., Any]:
    """MegatronOptimizer.__init__ and DistributedDataParallel.broadcast_params: what comes before any step."""

    @replaces(original)
    def after_agreement(self: Any, *args: Any, **kwargs: Any) -> Any:
        agree(anew=True)
        return original(self, *args, **kwargs)

    return after_agreement
