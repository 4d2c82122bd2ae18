"""Combinations that do not work with fp32 router parameters, or that no test has run: stopped before the first step.

There are two kinds. *Broken*: known to fail or to train wrongly. *Untested*: needs a GPU, which our tests do not have;
MEGATRON_FP32_ROUTER_UNTESTED=allow lets it through. Both depend on the tensors: a job that trains no fp32 router
parameters beside bf16 or fp16 ones (PROTECT=buffers, frozen routers, no mixture of experts) is never stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch

from megatron_fp32_router.casts.router import below_fp32, is_protected
from megatron_fp32_router.errors import CombinationRefusedError
from megatron_fp32_router.log import say
from megatron_fp32_router.patching.registry import mismatch, registry
from megatron_fp32_router.settings import PREFIX


def refuse(parameters: Iterable[Any], found: str, why: str, instead: str, *, untested: bool = False) -> None:
    """Stop if `parameters` holds fp32 router parameters to train beside ones of lower precision.

    Args:
        found: the configuration, as a noun.
        why: what would go wrong; the end of a sentence.
        instead: which flag to change; the beginning of a sentence.
        untested: whether MEGATRON_FP32_ROUTER_UNTESTED=allow lets it through.

    Raises:
        CombinationRefusedError: there are such parameters (under on_mismatch="raise").
    """
    seen = [parameter for parameter in parameters if isinstance(parameter, torch.Tensor)]
    ours = sum(is_protected(parameter) and parameter.requires_grad for parameter in seen)
    lower = {parameter.dtype for parameter in seen if below_fp32(parameter.dtype)}
    if not ours or not lower:
        return
    mixture = f"{ours} fp32 router parameters beside {' and '.join(sorted(map(plain, lower)))} ones"
    if untested and registry.settings.untested == "allow":
        say(
            logging.WARNING,
            f"{found} with {mixture}: {why}. Allowed by {PREFIX}_UNTESTED=allow.",
            once=True,
        )
        return
    allow = f", or try it with {PREFIX}_UNTESTED=allow" if untested else ""
    mismatch(
        CombinationRefusedError,
        f"{found} with {mixture}: {why}. {instead}, or set {PREFIX}_PROTECT=buffers, which keeps the balance update "
        f"exact and leaves the router's parameters to Megatron{allow}.",
    )


def plain(dtype: torch.dtype) -> str:
    """Its name as people write it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
