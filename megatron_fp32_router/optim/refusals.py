"""Combinations that fp32 router parameters do not survive, or that nobody has tried: stopped before the first step.

Two kinds. *Broken*: known to fail or to train wrongly. *Untested*: needs a GPU or a package that no test of ours has,
and is let through by MEGATRON_FP32_ROUTER_UNTESTED=allow. Both look at the tensors: a job that trains no fp32 router
parameters beside bf16 or fp16 ones (PROTECT=buffers, frozen routers, no mixture of experts) is never stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from megatron_fp32_router.errors import CombinationRefusedError, Fp32RouterError
from megatron_fp32_router.protect.casts import below_fp32, is_protected
from megatron_fp32_router.protect.effect import seen
from megatron_fp32_router.registry import mismatch, registry, replaces
from megatron_fp32_router.say import say
from megatron_fp32_router.settings import PREFIX


def _refuse(parameters: Iterable[Any], found: str, why: str, instead: str, *, untested: bool = False) -> None:
    """Stop if `parameters` holds fp32 router parameters to train beside ones of lower precision.

    Args:
        found: the configuration, as a noun.
        why: what would go wrong; a sentence's second half.
        instead: which flag to change; a sentence's beginning.
        untested: MEGATRON_FP32_ROUTER_UNTESTED=allow lets it through.

    Raises:
        CombinationRefusedError: there are such parameters (under on_mismatch="raise").
    """
    seen = [parameter for parameter in parameters if isinstance(parameter, torch.Tensor)]
    ours = sum(is_protected(parameter) and parameter.requires_grad for parameter in seen)
    lower = {parameter.dtype for parameter in seen if below_fp32(parameter.dtype)}
    if not ours or not lower:
        return
    mixture = f"{ours} fp32 router parameters beside {' and '.join(sorted(map(_plain, lower)))} ones"
    if untested and registry.settings.untested == "allow":
        say(
            logging.WARNING,
            f"{found} with {mixture}: {why}. Allowed by {PREFIX}_UNTESTED=allow.",
            threshold=registry.settings.log,
            once=True,
        )
        return
    allow = f", or try it with {PREFIX}_UNTESTED=allow" if untested else ""
    mismatch(
        CombinationRefusedError,
        f"{found} with {mixture}: {why}. {instead}, or set {PREFIX}_PROTECT=buffers, which keeps the balance update "
        f"exact and leaves the router's parameters to Megatron{allow}.",
    )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _grouped(optimizer: Any) -> Iterator[Any]:
    for group in getattr(optimizer, "param_groups", None) or ():
        yield from group["params"]


def refuse_where_used(original: Callable[..., Any], error: type[Fp32RouterError], message: str) -> Callable[..., Any]:
    """In the place of a function that has changed: an error if a model with fp32 router parameters is in this process.

    Raises:
        TargetChangedError: there is such a model (under on_mismatch="raise").
    """

    @replaces(original)
    def refused(*args: Any, **kwargs: Any) -> Any:
        if any(is_protected(parameter) for model in seen for parameter in model.parameters()):
            mismatch(error, message)
        return original(*args, **kwargs)

    return refused


# Optimizers ------------------------------------------------------------------------------------------------------


def _is_emerging(optimizer: Any) -> bool:
    """Whether this is an optimizer built on the package emerging_optimizers, other than Megatron's Muon from 0.18 on.

    Up to 0.17 it needs an older version of the package, which no test has run.
    """
    own = type(optimizer)
    if (own.__module__, own.__name__) == ("megatron.core.optimizer.emerging_optimizers", "TensorParallelMuon"):
        return False
    return any(
        base.__module__.partition(".")[0] == "emerging_optimizers"
        or base.__module__.startswith(("megatron.core.optimizer.muon", "megatron.core.optimizer.emerging_optimizers"))
        for base in type(optimizer).__mro__
    )


def look_at_configuration(original: Callable[..., None]) -> Callable[..., None]:
    """MixedPrecisionOptimizer.__init__, which every optimizer with main copies goes through.

    Raises:
        CombinationRefusedError: emerging optimizers.
    """

    @replaces(original)
    def __init__(self: Any, optimizer: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if _is_emerging(optimizer):
            _refuse(
                _grouped(optimizer),
                f"{type(optimizer).__name__} from emerging_optimizers",
                "no test has run it, and it computes a router's update in lower precision whatever its parameters are",
                "Train with --optimizer adam",
                untested=True,
            )
        original(self, optimizer, config, *args, **kwargs)

    return __init__


# Wrappers --------------------------------------------------------------------------------------------------------


def _look_at_wrapped(
    original: Callable[..., None], found: str, why: str, instead: str, *, untested: bool
) -> Callable[..., None]:
    @replaces(original)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        modules = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.nn.Module)]
        parameters = [parameter for module in modules for parameter in module.parameters()]
        _refuse(parameters, found, why, instead, untested=untested)
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
