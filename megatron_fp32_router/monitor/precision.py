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
#: What PROTECT=buffers keeps in fp32 as well.
_BUFFERS: Final = (
    "expert_bias",
    "local_tokens_per_expert",
    "global_tokens_per_expert",
    "ga_steps",
    "qb_beta",
    "qb_beta_accum",
)
_optimizers: Final[weakref.WeakSet[Any]] = weakref.WeakSet()

#: (parameters of the model, their main copies), in Megatron's optimizers.
_COPIES: Final = (
    ("float16_groups", "fp32_from_float16_groups"),
    ("fp32_from_fp32_groups", "fp32_from_fp32_groups"),
    ("model_float16_groups", "shard_fp32_from_float16_groups"),
    ("model_fp32_groups", "shard_fp32_groups"),
)


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

    A shard is left out: asking it would be a collective, or there is nothing to ask.
    """
    return {name: count_not_finite(tensor) for name, tensor, _ in tensors_of(router) if not sharded(tensor)}


def count_not_finite(tensor: torch.Tensor) -> torch.Tensor:
    """How many of its values are NaN or infinite: 0-dimensional, fp64."""
    return (~tensor.detach().isfinite()).sum(dtype=torch.float64)


def _optimizer_state(parameter: torch.Tensor) -> Iterator[tuple[str, torch.dtype]]:
    for optimizer in list(_optimizers):
        main = _main_copy(optimizer, parameter)
        inner = getattr(optimizer, "optimizer", None)
        state = getattr(inner, "state", {}).get(parameter if main is None else main, {})
        if main is not None and main is not parameter:
            yield "main", main.dtype
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() and value.is_floating_point():
                yield name, value.dtype
        if main is not None or state:
            return


def _main_copy(optimizer: Any, parameter: torch.Tensor) -> torch.Tensor | None:
    """The optimizer's copy (or shard) of `parameter`; None where this rank holds none."""
    for of_model, of_optimizer in _COPIES:
        models, copies = getattr(optimizer, of_model, None), getattr(optimizer, of_optimizer, None)
        if models is None or copies is None:
            continue
        for group, main_group in zip(models, copies, strict=False):
            for model, main in zip(group, main_group, strict=False):
                if model is parameter:
                    return main if isinstance(main, torch.Tensor) else None
    return None


def sharded(weight: torch.Tensor) -> bool:
    """Whether this rank holds only a part of `weight` now, or nothing: FSDP of one kind or another."""
    return type(weight).__name__ == "DTensor" or not weight.untyped_storage().size()


def probe(router: Any, dtype: torch.dtype) -> tuple[torch.dtype, torch.Tensor] | None:
    """Send rows with a single one in them through the router's own gating.

    Each result is then one element of the weight, without a sum and its rounding: fp32 gives it back as it is, TF32
    with 11 significant bits, bf16 with 8. (A weight that fits a narrower format anyway cannot tell them apart, and
    loses nothing.)

    Args:
        router: a TopKRouter.
        dtype: of the router's input in this run.

    Returns:
        dtype of the logits, and the largest relative error, a 0-dimensional fp64 tensor, NaN where a weight is not
        finite; None for a weight that is sharded over ranks, or broken already.
    """
    weight_EH = router.weight.detach()
    if below_fp32(weight_EH.dtype) and promised("weight", True):
        return None  # a violation of its own, on which the gating itself raises
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


def promised(name: str, mixed: bool) -> bool:
    """Whether the contract says that the tensor or result `name` is fp32.

    Args:
        name: as facts() has it, or "logits", "scores" or "arithmetic".
        mixed: whether the model trains in bf16 or fp16. One in fp32 keeps upstream's own gating.
    """
    if name == "arithmetic" and registry.settings.like:
        return False  # the user asked for an engine's
    if name in ("logits", "scores", "arithmetic"):
        return mixed
    if name in _BUFFERS:
        return True
    derived = name.partition("_")[2]
    # Main copies and moments below fp32 are the user's own choice with a precision-aware optimizer.
    return registry.settings.protect == "all" and (derived in ("", "grad") or not _moments_are_chosen())


def _moments_are_chosen() -> bool:
    configs = (getattr(optimizer, "config", None) for optimizer in _optimizers)
    return any(getattr(config, "use_precision_aware_optimizer", False) for config in configs)
