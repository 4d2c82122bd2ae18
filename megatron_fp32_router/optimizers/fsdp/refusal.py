"""What of FSDP is refused before the first step: Megatron's, and torch's where torch is too old."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from megatron_fp32_router.optimizers.refusing import refuse
from megatron_fp32_router.patching.registry import replaces


def refuse_in(arguments: Iterable[Any], found: str, why: str, instead: str, *, untested: bool = False) -> None:
    """`refuse`, for the parameters of the modules among `arguments`."""
    modules = [value for value in arguments if isinstance(value, torch.nn.Module)]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    refuse(parameters, found, why, instead, untested=untested)


def refuse_megatron_fsdp(original: Callable[..., None]) -> Callable[..., None]:
    """FullyShardedDataParallel.__init__ of custom_fsdp (0.12, 0.13) and of Megatron-FSDP (0.14 and later).

    Raises:
        CombinationRefusedError: no test has run it on a GPU or resumed it.
    """

    @replaces(original)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        refuse_in(
            (*args, *kwargs.values()),
            "Megatron-FSDP (--use-megatron-fsdp, --use-custom-fsdp)",
            "no test has run it on a GPU, nor resumed it from a checkpoint",
            "Train without it",
            untested=True,
        )
        original(self, config, *args, **kwargs)

    return __init__
