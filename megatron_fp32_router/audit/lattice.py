"""Which values an expert's bias can have: those that additions of ±rate in fp32 can reach.

Megatron adds `sign(error) * rate` to every bias once per step. In fp32, within one binade [2^e, 2^(e+1)) each addition
moves the bias by exactly q(e): the rate rounded to that binade's spacing. So the number of steps between two values of
one chain is an integer when each binade is measured in its own q, in whatever order the steps were made. Crossing into
a larger binade rounds once, by less than half its spacing, and the way back does not undo it. `steps` computes that
number. Unless values were once far larger, it is an integer to within `allowance`: 200,000 steps of 1e-3 end at 200.45
instead of 200, and `steps` gives 200,000 for them.

A bias that was cast to bf16 or fp16, or moved by something else, is not a whole number of steps. A counter in bf16
leaves a trace of its own: `sign(bf16) * rate` is the rate *rounded to bf16*, 0.0009994507 instead of 0.001
(https://github.com/NVIDIA/Megatron-LM/pull/7081), so that the chain fits that rate and not the true one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

#: Rates that are tried when neither the user nor the checkpoint says which: Megatron's default first.
USUAL_RATES: Final = (1e-3, 1e-4, 1e-2, 5e-4, 2e-3, 5e-3, 2e-4)

#: A value whose steps are further than this from an integer is off the lattice. 1 in 10 random values are within it.
TOLERANCE: Final = 0.05

#: Dtypes to which Megatron may have rounded the step before it was added: that of the token counter.
ROUNDINGS: Final[dict[str, Any]] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def rounded(rate: float, dtype: str) -> float:
    """The rate as a tensor of that dtype holds it, then in fp32; 0 or infinity if it cannot."""
    with np.errstate(over="ignore"):
        return float(np.float32(ROUNDINGS[dtype](rate)))


def steps(bias: NDArray[Any], rate: float) -> NDArray[np.float64]:
    """How many additions of `rate` in fp32 lead from 0 to each value: [experts]; NaN where none can.

    Args:
        bias: finite, of any shape.
        rate: positive, exactly representable in fp32.
    """
    size = np.abs(bias.astype(np.float64))
    # Below this the spacing of fp32 is under 1e-10 of the rate.
    low = 2.0 ** (math.floor(math.log2(rate)) - 8)
    total = np.minimum(size, low) / rate
    top, edge = float(size.max(initial=0.0)), low
    while edge < top:
        q = _step_in_binade(edge, rate)
        inside = np.clip(size - edge, 0.0, edge)
        with np.errstate(invalid="ignore", divide="ignore"):
            total += np.where(inside > 0, inside / q if q else np.nan, 0.0)
        edge *= 2
    return np.copysign(total, bias.astype(np.float64))


def _step_in_binade(edge: float, rate: float) -> float:
    """By how much an addition of `rate` moves a value in [edge, 2 * edge); 0 where it is rounded away."""
    spacing = edge * 2.0**-23
    return float(np.round(rate / spacing)) * spacing


def allowance(bias: NDArray[Any], rate: float) -> float:
    """How far from an integer, in steps, fp32's own rounding may put a value of the chain."""
    # A value beyond fp32's range is 0.5 steps off the chain in any case.
    largest = float(np.abs(bias.astype(np.float64)).max(initial=0.0))
    # Crossing a binade rounds by half a spacing at most: together below one spacing of the largest value. Twice that,
    # since it may have been in the next binade and come back. Twice again, since the chain's start has such an error.
    return 4 * float(np.spacing(np.float32(min(largest, 1e38)))) / rate + 1e-6


@dataclass(frozen=True)
class Fit:
    """How well the biases of one router fit the chain of one step size."""

    rate: float
    #: What the rate was rounded to: "float32", "bfloat16" or "float16".
    rounding: str
    #: The step in use: `rate` rounded.
    step: float
    #: Distance of each value from the chain, in steps: [experts], at most 0.5.
    off: NDArray[np.float64]
    #: How much of it fp32's own rounding explains.
    allowed: float
    #: How many different values (or differences) the fit rests on.
    distinct: int
    #: Other roundings of the same rate that explain the values too: at this size they make the same step.
    alike: tuple[str, ...] = ()

    @property
    def worst(self) -> float:
        return float(self.off.max(initial=0.0))

    @property
    def exact(self) -> bool:
        """Whether rounding explains every distance."""
        return self.worst <= self.allowed

    @property
    def share(self) -> float:
        """Share of values on the chain."""
        return float(np.mean(self.off <= max(TOLERANCE, self.allowed)))

    @property
    def chance(self) -> float:
        """How likely it is that as many random values all lie this close to a chain, whose start one of them fixes."""
        width = 2 * max(self.allowed, self.worst, 1e-9)
        return float(min(1.0, self.distinct * min(1.0, width) ** max(0, self.distinct - 1)))


def fit(bias: NDArray[Any], rate: float, rounding: str, since: NDArray[Any] | None = None) -> Fit:
    """Fit one router's biases to one step size.

    The chain may start anywhere, since a common start and a subtracted mean (Moonlight, torchtitan) move all experts
    alike. With `since`, an earlier state, every expert has moved by whole steps from there.
    """
    step = rounded(rate, rounding)
    count = steps(bias, step)
    if since is None:
        reference, offset, distinct = bias, _common_offset(count), np.unique(bias).size
    else:
        reference, offset = np.concatenate([bias.ravel(), since.ravel()]), 0.0
        distinct = np.unique(bias.astype(np.float64) - since.astype(np.float64)).size
        count = count - steps(since, step)
    distance = np.nan_to_num(np.abs((count - offset + 0.5) % 1.0 - 0.5), nan=0.5)
    return Fit(rate, rounding, step, distance, allowance(reference, step), int(distinct))


def _common_offset(count: NDArray[np.float64]) -> float:
    """The fractional part around which most values lie. Fractions are on a circle: 0.99 is close to 0."""
    fraction = np.sort(count[np.isfinite(count)] % 1.0)
    if fraction.size < 2:
        return float(fraction[0]) if fraction.size else 0.0
    # The shortest arc that holds half of the values.
    half = fraction.size // 2 + 1
    circle = np.concatenate([fraction, fraction + 1.0])
    width = circle[half - 1 : half - 1 + fraction.size] - circle[: fraction.size]
    start = int(width.argmin())
    return float(np.median(circle[start : start + half]))


def best(bias: NDArray[Any], rates: Sequence[float], since: NDArray[Any] | None = None) -> Fit:
    """The step size that fits: the first that explains all values exactly, else the one with most values on its chain.

    The likeliest of `rates` comes first. Each is tried unrounded before rounded: where both fit, there is no sign of a
    defect.
    """
    held = [(rate, rounding) for rate in rates for rounding in ROUNDINGS if 0 < rounded(rate, rounding) < math.inf]
    fits = [fit(bias, rate, rounding, since) for rate, rounding in held]
    chosen = next((f for f in fits if f.exact), None)
    if chosen is None:
        return max(fits, key=lambda f: (f.share, -f.worst))
    alike = tuple(f.rounding for f in fits if f.exact and f.rate == chosen.rate and f is not chosen)
    return replace(chosen, alike=alike)


def moved(bias: NDArray[Any], rate: float) -> NDArray[Any]:
    """Where one step of `rate` takes biases that are held in the dtype of `bias`: (up, down), [2, experts].

    As torch adds a low-precision tensor and a scaled sign: in fp32, then rounded.
    """
    wide = bias.astype(np.float32)
    step = np.float32(rate if bias.dtype == np.float32 else bias.dtype.type(rate))
    return np.stack([(wide + step).astype(bias.dtype), (wide - step).astype(bias.dtype)])


def swallowed(bias: NDArray[Any], rate: float) -> NDArray[np.bool_]:
    """Which biases, held in the dtype of `bias`, cannot take a step of `rate`: (up, down), [2, experts]."""
    stays: NDArray[np.bool_] = moved(bias, rate) == bias
    return stays
