"""What of FSDP is refused before the first step: of Megatron-FSDP, and torch FSDP2 where torch is too old."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from megatron_fp32_router.casts.router import below_fp32
from megatron_fp32_router.optimizers.refusing import plain, refuse
from megatron_fp32_router.patching.registry import replaces


def refuse_in(arguments: Iterable[Any], found: str, why: str, instead: str, *, untested: bool = False) -> None:
    """`refuse`, for the parameters of the modules among `arguments`."""
    modules = [value for value in arguments if isinstance(value, torch.nn.Module)]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    refuse(parameters, found, why, instead, untested=untested)


def refuse_megatron_fsdp(original: Callable[..., None]) -> Callable[..., None]:
    """FullyShardedDataParallel.__init__: custom_fsdp (0.12, 0.13), Megatron-FSDP before 0.16, main's second version.

    Raises:
        CombinationRefusedError: no test has resumed it from a checkpoint.
    """

    @replaces(original)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        refuse_in(
            (*args, *kwargs.values()),
            "Megatron-FSDP (--use-megatron-fsdp, --use-custom-fsdp)",
            "no test has resumed this version of it from a checkpoint",
            "Train without it, or with its version 1 in Megatron-Core 0.16 or later",
            untested=True,
        )
        original(self, config, *args, **kwargs)

    return __init__


def refuse_low_main_copies(original: Callable[..., None]) -> Callable[..., None]:
    """MegatronFSDP.__init__, which from 0.17 takes one dtype for the main copies of all parameters.

    Raises:
        CombinationRefusedError: that dtype is below fp32. A router's fp32 weight is made of its main copy in each step.
    """

    @replaces(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = (*args, *kwargs.values())
        for dtype in (getattr(value, "main_params_dtype", None) for value in given):
            if dtype is not None and below_fp32(dtype):
                refuse_in(
                    given,
                    f"Megatron-FSDP's main copies in {plain(dtype)}",
                    f"a router's weight would be rounded to {plain(dtype)} in every step",
                    "Set --megatron-fsdp-main-params-dtype to fp32, which is the default",
                )
        original(self, *args, **kwargs)

    return __init__
