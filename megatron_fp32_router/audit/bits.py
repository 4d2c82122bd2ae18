"""Whether fp32 values have been through bf16 or fp16: by their bits, with how likely chance is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Different magnitudes that must fit before chance, and round numbers that people choose, are ruled out:
#: 2^-64 for bf16.
ENOUGH: Final = 4

#: The cast, and how many low mantissa bits of an fp32 value it clears (fp16: for values of its own range).
CASTS: Final[dict[str, tuple[Any, int]]] = {"bfloat16": (ml_dtypes.bfloat16, 16), "float16": (np.float16, 13)}


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

    @property
    def all_fit(self) -> bool:
        return self.nonzero > 0 and self.fitting == self.nonzero

    @property
    def log2_chance(self) -> float:
        """log2 of the probability that this many random fp32 values fit by chance (a bound for partial fits)."""
        n, k, bits = self.distinct, self.distinct_fitting, CASTS[self.dtype][1]
        if k == 0:
            return 0.0
        ways = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)
        return min(0.0, ways - bits * k)


def rounded(values: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """A cast without warnings: whatever a file holds may overflow, and then it does not fit."""
    with np.errstate(all="ignore"):
        cast: NDArray[Any] = values.astype(dtype)
        return cast


def fitting(values: NDArray[Any], dtype: str) -> Fitting:
    """Count the values of an fp32 or fp64 tensor that `dtype` ("bfloat16" or "float16") holds exactly."""
    flat = np.abs(values.reshape(-1).astype(np.float64))
    flat = flat[flat != 0]
    magnitudes, inverse = np.unique(flat, return_inverse=True)
    fits = rounded(magnitudes, CASTS[dtype][0]).astype(np.float64) == magnitudes
    return Fitting(dtype, flat.size, int(fits[inverse].sum()), magnitudes.size, int(fits.sum()))


def distinct(values: NDArray[Any], dtype: str | None = None) -> int:
    """Different values in a tensor, as they are or after a cast."""
    cast = values if dtype is None else rounded(values, CASTS[dtype][0])
    return int(np.unique(cast.astype(np.float64)).size)
