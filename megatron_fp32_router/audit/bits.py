"""Whether fp32 values were cast to bf16 or fp16: their bits show it, and how likely such bits are without a cast.

Values that were never cast can fit a narrow dtype too: 10 additions of bf16(1e-3) make 10 * 131 * 2^-17, which needs no
more than the 11 bits of fp16. So the chance depends on the grid on which values without a cast lie: multiples of 2^g.
A dtype with a spacing of 2^s around a value has one in 2^(s - g) points of that grid, wherever the biases started. It
has at least one in 2^16 (fp16: 2^13) of all fp32 numbers. The chance of a tensor is the product over its different
magnitudes, for the coarsest grid that its history allows: `_grain`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import ml_dtypes  # noqa: F401 - NumPy has a dtype "bfloat16" from here on
import numpy as np

from megatron_fp32_router.audit import lattice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

#: How many different magnitudes must fit: somebody may have chosen a few round numbers, such as 0.5.
ENOUGH: Final = 4

#: log2 of the chance at which a cast becomes the explanation: one in a million.
IMPROBABLE: Final = -20

#: How many low mantissa bits of an fp32 value a cast clears (fp16: for values of its own range), by dtype.
CASTS: Final = {"bfloat16": 16, "float16": 13}


@dataclass(frozen=True)
class Fitting:
    """How many values of a tensor a narrower dtype holds exactly."""

    dtype: str
    #: Values that are not zero, and those of them that fit.
    nonzero: int
    fitting: int
    #: Different magnitudes among the nonzero values, and those of them that fit.
    distinct: int
    distinct_fitting: int
    #: log2 of the probability (an upper bound) that as many values fit without a cast, whatever led to them.
    log2_chance: float

    @property
    def all_fit(self) -> bool:
        return self.nonzero > 0 and self.fitting == self.nonzero

    @property
    def improbable(self) -> bool:
        """Whether only a cast explains that as many fit."""
        return self.distinct_fitting >= ENOUGH and self.log2_chance <= IMPROBABLE

    @property
    def chance(self) -> str:
        return f"chance: 2^{round(self.log2_chance)}"


def rounded(values: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """Cast without warnings. A value may overflow; it then differs from what it was."""
    with np.errstate(all="ignore"):
        cast: NDArray[Any] = values.astype(dtype)
        return cast


def laundered(values: NDArray[Any]) -> Fitting | None:
    """The cast that explains why a narrower dtype holds all of these values; None where there was none."""
    fits = (fitting(values, dtype) for dtype in CASTS)
    return next((fit for fit in fits if fit.all_fit and fit.improbable), None)


def fitting(values: NDArray[Any], dtype: str, rates: Sequence[float] = ()) -> Fitting:
    """Count the values of an fp32 or fp64 tensor that `dtype` ("bfloat16" or "float16") holds exactly.

    Args:
        rates: for an expert_bias, the update rates that led to the values, if they are known.
    """
    flat = values.reshape(-1).astype(np.float64)
    flat = flat[flat != 0]
    magnitudes, inverse = np.unique(np.abs(flat), return_inverse=True)
    fits = rounded(magnitudes, dtype).astype(np.float64) == magnitudes
    of_all = fits[inverse]
    chance = _log2_chance(magnitudes, fits, dtype, _grain(flat[of_all], rates))
    return Fitting(dtype, flat.size, int(of_all.sum()), magnitudes.size, int(fits.sum()), chance)


def _grain(values: NDArray[np.float64], rates: Sequence[float]) -> float:
    """log2 of the coarsest grid on which values that were never cast can lie.

    It is no coarser than the last bit that any value has. If rates are known, it is also no coarser than twice the last
    bit of a step: all biases have made the same number of steps, so an even number of steps lies between two of them.
    A step may have been rounded by the counter's dtype, or when it was added to a bias of this size.
    """
    own = float(_last_bit(values).min(initial=np.inf))
    if not rates:
        return own
    narrow = rounded(values, np.float32)
    steps = [np.float32(lattice.rounded(rate, rounding)) for rate in rates for rounding in lattice.ROUNDINGS]
    with np.errstate(all="ignore"):
        moves = np.concatenate([narrow + step - narrow for step in steps])
    return min(own, float(_last_bit(moves[np.isfinite(moves)]).max(initial=-np.inf)) + 1)


def _last_bit(values: NDArray[Any]) -> NDArray[np.float64]:
    """The exponent of the lowest bit that is set, of each value that is not zero."""
    fraction, exponent = np.frexp(values[values != 0].astype(np.float64))
    whole = np.ldexp(fraction, 53).astype(np.int64)
    last: NDArray[np.float64] = np.log2((whole & -whole).astype(np.float64)) + exponent - 53
    return last


def _log2_chance(magnitudes: NDArray[np.float64], fits: NDArray[np.bool_], dtype: str, grain: float) -> float:
    """log2 of the chance that as many magnitudes of a grid fit."""
    cleared = CASTS[dtype]
    spacing = np.frexp(magnitudes)[1] - (24 - cleared)
    bits = np.clip(spacing - grain, 0, cleared)
    count, expected = int(fits.sum()), float(np.exp2(-bits).sum())
    if count == fits.size:
        return -float(bits.sum())
    if count <= expected:
        return 0.0
    # Only a part of them fits: Chernoff's bound.
    return float(count * np.log2(expected / count) + (count - expected) * np.log2(np.e))


def distinct(values: NDArray[Any]) -> int:
    """How many different values a tensor has."""
    return int(np.unique(values.astype(np.float64)).size)
