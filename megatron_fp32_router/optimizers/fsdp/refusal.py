"""FSDP, torch's and Megatron's: refused before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_fp32_router.optimizers.refusing import refuse
from megatron_fp32_router.patching.registry import replaces


def _look_at_wrapped(
    original: Callable[..., None], found: str, why: str, instead: str, *, untested: bool
) -> Callable[..., None]:
    @replaces(original)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        modules = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.nn.Module)]
        parameters = [parameter for module in modules for parameter in module.parameters()]
        refuse(parameters, found, why, instead, untested=untested)
        original(self, config, *args, **kwargs)

    return __init__


def look_at_fsdp2(original: Callable[..., None]) -> Callable[..., None]:
    """TorchFullyShardedDataParallel.__init__.

    Raises:
        CombinationRefusedError: torch's FSDP2 asserts one parameter dtype per unit, in the first forward.
    """
    return _look_at_wrapped(
        original,
        "torch FSDP2 (--use-torch-fsdp2)",
        'torch stops the first forward with "FSDP expects uniform original parameter dtype"',
        "Train without --use-torch-fsdp2",
        untested=False,
    )


def look_at_megatron_fsdp(original: Callable[..., None]) -> Callable[..., None]:
    """FullyShardedDataParallel.__init__ of custom_fsdp (0.12, 0.13) and of Megatron-FSDP (0.14 and later).

    Raises:
        CombinationRefusedError: it needs a GPU, and no test has run it.
    """
    return _look_at_wrapped(
        original,
        "Megatron-FSDP (--use-megatron-fsdp, --use-custom-fsdp)",
        "no test has run it: it needs a GPU",
        "Train without it",
        untested=True,
    )
