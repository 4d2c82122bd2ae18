"""The precision contract as it is now: dtypes of everything a router decides with, and the arithmetic of its gating."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

from megatron_fp32_router.casts.router import below_fp32
from megatron_fp32_router.patching.registry import registry, replaces
from megatron_fp32_router.wrapping.survey import tensors_of

#: Rows of the arithmetic probe. As many as a small micro-batch has: a library may compute a few rows in another way.
_ROWS: Final = 512
_optimizers: Final[weakref.WeakSet[Any]] = weakref.WeakSet()


def remember_optimizer(original: Callable[..., None]) -> Callable[..., None]:
    """MegatronOptimizer.__init__: the monitor looks later at what state it holds."""

    @replaces(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _optimizers.add(self)

    return __init__


def facts(router: Any) -> dict[str, torch.dtype]:
    """Name -> dtype of every router tensor, gradient, main copy and optimizer moment that exists now.

    Derived tensors are named after the parameter: weight_grad, weight_main, weight_exp_avg, ….
    """
    found = {}
    for name, tensor, is_parameter in tensors_of(router):
        found[name] = tensor.dtype
        if not is_parameter:
            continue
        # DDP's accumulated gradient where there is one: `grad` is only a passing view then.
        gradient = getattr(tensor, "main_grad", None)
        gradient = tensor.grad if gradient is None else gradient
        if gradient is not None:
            found[f"{name}_grad"] = gradient.dtype
        for kind, dtype in _optimizer_state(tensor):
            found[f"{name}_{kind}"] = dtype
    return found


def not_finite(router: Any) -> dict[str, torch.Tensor]:
    """Name -> how many values of a router tensor are NaN or infinite, a 0-dimensional tensor on the device.

    Shards are left out: counting in a DTensor is a collective, and a shard that is freed holds nothing.
    """
    return {name: count_not_finite(tensor) for name, tensor, _ in tensors_of(router) if not sharded(tensor)}


def count_not_finite(tensor: torch.Tensor) -> torch.Tensor:
    """How many of its values are NaN or infinite: 0-dimensional, fp64."""
    return (~tensor.detach().isfinite()).sum(dtype=torch.float64)


def _optimizer_state(parameter: torch.Tensor) -> Iterator[tuple[str, torch.dtype]]:
    """("main", dtype) of the optimizer's copy of `parameter`, and (name, dtype) of its moments.

    Nothing where this rank holds no shard of it.
    """
    # Megatron's optimizers put the main copy of a parameter below fp32 on it.
    main = getattr(parameter, "main_param", None)
    if main is not None:
        yield "main", main.dtype
    for optimizer in list(_optimizers):
        inner: Any = getattr(optimizer, "optimizer", None)
        held = parameter if main is None else main
        # The distributed optimizer steps a shard of the main copy, or of the parameter itself.
        place = getattr(optimizer, "model_param_group_index_map", {}).get(parameter)
        if place is not None:
            held = inner.param_groups[place[0]]["params"][place[1]]
        for name, value in getattr(inner, "state", {}).get(held, {}).items():
            if isinstance(value, torch.Tensor) and value.dim() and value.is_floating_point():
                yield name, value.dtype


def sharded(weight: torch.Tensor) -> bool:
    """Whether this rank holds only a part of `weight` now, or nothing: FSDP of one kind or another."""
    return type(weight).__name__ == "DTensor" or not weight.untyped_storage().size()


def probe(router: Any, dtype: torch.dtype) -> tuple[torch.dtype, torch.Tensor] | None:
    """Send rows that hold a single 1 through the router's own gating.

    Each result is then one element of the weight, without a sum and its rounding: fp32 returns it as it is, TF32 with
    11 significant bits, bf16 with 8. (A weight that fits a narrower format cannot tell them apart, and loses nothing.)

    Args:
        router: a TopKRouter.
        dtype: of the router's input in this run.

    Returns:
        dtype of the logits, and the largest relative error, a 0-dimensional fp64 tensor, NaN where a weight is not
        finite; None for a weight that is sharded over ranks, or broken already.
    """
    weight_EH = router.weight.detach()
    if below_fp32(weight_EH.dtype) and promised(router, "weight"):
        return None  # the gating would raise, and the weight's dtype is a violation already
    if sharded(router.weight):
        return None
    columns = weight_EH.shape[1]
    rows = min(_ROWS, columns)
    at = torch.arange(rows, device=weight_EH.device) * columns // rows
    input_TH = torch.zeros(rows, columns, dtype=dtype, device=weight_EH.device)
    input_TH[torch.arange(rows, device=weight_EH.device), at] = 1
    with torch.no_grad():
        # [S, B, H], as in a model.
        logits_TE = router.gating(input_TH.unsqueeze(1)).view(rows, -1)
        expected_TE = weight_EH.double().t()[at]
        size_TE = expected_TE.abs()
        linear_bias = getattr(router, "bias", None)
        if linear_bias is not None:
            expected_TE = expected_TE + linear_bias.detach().double()
            size_TE = size_TE + linear_bias.detach().double().abs()
        error_TE = (logits_TE.double() - expected_TE).abs() / size_TE
        # Near the end of fp32's range there is no precision left to lose.
        error_TE = torch.where(size_TE < 1e-30, 0.0, error_TE)
        return logits_TE.dtype, error_TE.max()


def bits_of(error: float, dtype: torch.dtype) -> float:
    """Significant bits of an arithmetic with results in `dtype` whose largest relative error is `error`.

    24 for fp32, 11 for TF32, 8 for bf16.
    """
    most = 1 - math.log2(torch.finfo(dtype).eps)
    # Rounding to nearest with p significant bits errs by at most 2^-p.
    return most if error == 0 else max(0.0, min(most, -math.log2(error)))


def promised(router: Any, name: str) -> bool:
    """Whether the contract says that a tensor or a result of `router` is fp32.

    Args:
        router: a TopKRouter.
        name: as facts() has it, or "logits", "scores" or "arithmetic".
    """
    if name in router._buffers:
        return True
    if name in ("logits", "scores", "arithmetic"):
        # A model that trains in fp32 keeps upstream's own gating. MEGATRON_FP32_ROUTER_LIKE asks for an engine's.
        mixed = bool(router.config.bf16 or router.config.fp16)
        return mixed and not (name == "arithmetic" and registry.settings.like)
    derived = name.partition("_")[2]
    # Main copies and moments below fp32 are the user's own choice with a precision-aware optimizer.
    chosen = any(getattr(getattr(each, "config", None), "use_precision_aware_optimizer", False) for each in _optimizers)
    return registry.settings.protect == "all" and (derived in ("", "grad") or not chosen)
