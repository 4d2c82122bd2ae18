"""Subtract one constant from all expert biases of a layer, so that an engine that rounds them to bf16 rounds less.

The choice of experts compares score + bias between experts, and a group's score is the sum of two of these, so that the
same constant for every expert changes no comparison. Near 30 neighbouring bf16 numbers are 0.125 apart, near 0.5 0.002.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import ml_dtypes
import numpy as np

from megatron_fp32_router.audit.tensors import kind_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Shift:
    """What was done to the biases of one layer."""

    #: What was subtracted; 0.0: nothing was.
    constant: float
    #: Why nothing was subtracted; "" where something was.
    why: str = ""


def shift_expert_bias(
    state: Mapping[str, NDArray[Any]], how: Literal["min", "mean"] = "min"
) -> tuple[dict[str, NDArray[Any]], dict[str, Shift]]:
    """Shift the expert biases of a state dictionary, layer by layer, and leave everything else as it is.

    A layer is shifted only where fp32 holds every difference exactly, and where bf16 then holds the biases better.

    Args:
        state: arrays by name, Megatron's or Hugging Face's names. expert_bias: float32 [experts].
        how: "min": no bias is negative afterwards. Needed where an engine multiplies the scores of masked groups by
            zero (TensorRT-LLM's unfused path): a masked expert would win over one with a score below zero. "mean": for
            engines that mask with minus infinity; the biases are then even smaller.

    Returns:
        The state, shifted, and a Shift for every expert_bias in it.
    """
    new, shifts = dict(state), {}
    for name, values in state.items():
        if kind_of(name, hugging_face=True) == "expert_bias":
            new[name], shifts[name] = _shifted(values, how)
    return new, shifts


def shift_exported(weights: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Shift the expert biases among weights on their way to an engine, and yield everything else as it is.

    Args:
        weights: (name, tensor, ...), by Hugging Face's or Megatron's names, one after the other: what the exporters of
            Megatron-Bridge, mbridge, mcore-bridge, verl and slime yield. A bias that is not fp32 is left as it is.
    """
    for name, tensor, *further in weights:
        if kind_of(name, hugging_face=True) == "expert_bias" and "float32" in str(tensor.dtype):
            moved, _ = shift_expert_bias({name: tensor.detach().cpu().numpy()})
            yield (name, tensor.new_tensor(moved[name]), *further)
        else:
            yield (name, tensor, *further)


def _shifted(values: NDArray[Any], how: str) -> tuple[NDArray[Any], Shift]:
    if values.dtype != np.float32 or values.ndim != 1 or not values.size or not np.isfinite(values).all():
        return values, Shift(0.0, f"expected finite float32 [experts], found {values.dtype} {list(values.shape)}")
    exact = values.astype(np.float64)
    # On the grid of the largest value, rounded down. Where all biases have the same sign, every difference is then
    # a multiple of its own bias's spacing and not larger than that bias: fp32 holds it.
    grid = float(np.spacing(np.abs(values).max()))
    constant = float(np.floor((exact.min() if how == "min" else exact.mean()) / grid) * grid)
    moved = (exact - constant).astype(np.float32)
    if not np.array_equal(moved.astype(np.float64), exact - constant):
        return values, Shift(0.0, "fp32 does not hold every difference from one constant exactly")
    if _error(moved) >= _error(values):
        return values, Shift(0.0, "bfloat16 holds these biases as well as shifted ones")
    return moved, Shift(constant)


def _error(values: NDArray[Any]) -> float:
    """The largest error of these values in bf16."""
    return float(np.abs(values.astype(ml_dtypes.bfloat16).astype(np.float64) - values).max())
