"""The questions about expert biases: did updates take effect, and can another dtype still tell experts apart?"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from megatron_fp32_router.audit import bits, lattice
from megatron_fp32_router.audit.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from megatron_fp32_router.audit.finding import Verdict
    from megatron_fp32_router.audit.tensors import RouterTensor

#: How many different values must lie on one chain: one fixes where it starts, two confirm it.
ENOUGH: Final = 3

#: How many steps must lie between the quartiles of a router's biases before a shared value needs an explanation.
_FAR: Final = 12


def questions(tensor: RouterTensor, known: Sequence[float]) -> list[Finding]:
    """Answers for one finite expert_bias, [experts].

    Args:
        known: rates that the user or the checkpoint gave; if none, the usual rates are tried.
    """
    return [_updates(tensor, known), *_room(tensor)]


def _updates(tensor: RouterTensor, known: Sequence[float]) -> Finding:
    """Are the values what whole, unrounded updates lead to?"""
    values = tensor.values
    assert values is not None
    rates = list(known) or list(lattice.USUAL_RATES)
    assumed = "" if known else ", assuming a usual rate"
    data: dict[str, Any] = {"rates": list(known), "values": values.astype(float).ravel().tolist()[:1024]}
    found = partial(Finding, tensor.name, "updates", data=data)
    distinct = bits.distinct(values)
    stuck = lattice.swallowed(values, lattice.rounded(rates[0], "float32"))
    data.update(distinct=distinct, cannot_go_up=int(stuck[0].sum()), cannot_go_down=int(stuck[1].sum()))
    swallowing = int(stuck.any(axis=0).sum())
    rate = f"{rates[0]:g}"
    if swallowing:
        same = f"; all {values.size} hold {float(values.flat[0]):g}" if distinct == 1 and values.size > 1 else ""
        text = (
            f"{swallowing} of {values.size} biases cannot take an update of {rate} in {tensor.dtype}: "
            f"it is rounded away, upwards for {int(stuck[0].sum())}, downwards for {int(stuck[1].sum())}{same}{assumed}"
        )
        return found("problem", text)
    if not np.any(values):
        return found("unknown", "cannot tell: every bias is zero")
    if distinct == 1 and values.size > 1:
        text = (
            f"cannot tell: all {values.size} biases hold {float(values.flat[0]):g}, as if no update had ever been made"
        )
        return found("unknown", text)
    if tensor.dtype != "float32":
        # Its values lie on the grid of its dtype, so only the size of a step can be judged.
        step = np.abs(lattice.moved(values, rates[0]).astype(float) - values.astype(float))
        data["realised"] = [float(step.min()), float(step.max())]
        text = (
            f"an update of {rate} moves these biases by {step.min():.3g} to {step.max():.3g} in {tensor.dtype}{assumed}"
        )
        return found("problem" if step.max() > 1.01 * rates[0] or step.min() < 0.99 * rates[0] else "good", text)
    grid = bits.fitting(values, "bfloat16", known)
    if grid.all_fit and grid.improbable:
        stuck = lattice.swallowed(bits.rounded(values, "bfloat16"), rates[0])
        data.update(cannot_go_up=int(stuck[0].sum()), cannot_go_down=int(stuck[1].sum()))
        text = (
            f"every bias lies on bfloat16's grid, which whole steps in fp32 would have left ({grid.chance}); held in "
            f"bfloat16, {int(stuck.any(axis=0).sum())} of {values.size} cannot take another step of {rate}{assumed}"
        )
        return found("problem", text)
    fit = fitted(values, known)
    verdict, text = verdict_on_fit(fit, values.size, known, data)
    if verdict != "problem":
        verdict, text = _frozen(values, fit, known, data) or (verdict, text)
    return found(verdict, text)


def fitted(values: NDArray[Any], known: Sequence[float], since: NDArray[Any] | None = None) -> lattice.Fit:
    """The step size that explains the values: that of a known rate, unless only another rate explains all of them.

    Any value lies near a lattice that is fine enough. So another rate counts only where it is improbable that the
    values that the known rate does not explain lie near its lattice by chance.
    """
    if not known:
        return lattice.best(values, lattice.USUAL_RATES, since)
    fit = lattice.best(values, known, since)
    others = [rate for rate in lattice.USUAL_RATES if rate not in known]
    if fit.exact or not others:
        return fit
    other = lattice.best(values, others, since)
    moved = values if since is None else values.astype(np.float64) - since.astype(np.float64)
    plain = (lattice.fit(values, rate, "float32", since) for rate in known)
    unexplained = min(np.unique(moved[one.off > one.allowed]).size for one in plain)
    by_chance = min(1.0, 2 * max(other.worst, other.allowed)) ** unexplained
    better = other.exact if fit.share == 1.0 else other.share == 1.0
    return other if better and by_chance < 1e-3 else fit


def _frozen(
    values: NDArray[Any], fit: lattice.Fit, known: Sequence[float], data: dict[str, Any]
) -> tuple[Verdict, str] | None:
    """(verdict, text) if more experts hold one value than chance explains, else None.

    Experts share values by chance. Early in training there are few values; and only every second one is taken, since
    all experts have made the same number of steps. How many experts may share one follows from how far the others are
    apart: their middle half gives the width of a normal distribution, and up to twice its peak counts as chance.
    Experts that are in balance to one step meet in every second step, but noise has ended that by the time the others
    are far apart.
    """
    places, counts = np.unique(values, return_counts=True)
    held, common = int(counts.max()), places[counts.argmax()]
    walked = lattice.steps(values.ravel(), fit.step)
    others = walked[values.ravel() != common]
    if held < ENOUGH + 1 or others.size < 2 * ENOUGH:
        return None
    low, high = np.percentile(others, (25, 75))
    if high - low < _FAR:
        return None
    share = min(1.0, 1.6 * 1.35 / float(high - low))
    chance = min(1.0, places.size * _at_least(held, values.size, share))
    at = float(lattice.steps(np.array([common]), fit.step)[0])
    near = int((np.abs(others - at) <= 4).sum())
    data.update(most_in_one_place=held, chance_of_that=chance)
    if chance > 1e-6 or held < 2 * near:
        # The second condition: many experts around one value are in balance, and meet there.
        return None
    spread = round(float(others.max() - others.min()))
    text = (
        f"{held} of {values.size} biases hold exactly {float(common):g}, while the others are up to {spread} steps of "
        f"{fit.rate:g} apart (chance: {chance:.1g}): no update reached these, or they were swallowed there"
    )
    if common and common in (values.min(), values.max()):
        # Experts that no token chose make every step in the same direction, and so meet at the end. 0 is the start.
        return "unknown", f"cannot tell: {text}, or they went the same way in every step"
    return ("problem", text) if known else ("unknown", f"cannot tell: {text}")


def _at_least(least: int, of: int, share: float) -> float:
    """Probability that at least `least` of `of` independent draws, each with probability `share`, succeed."""
    if share >= 1.0:
        return 1.0
    up, down = math.log(share), math.log1p(-share)
    ways = (math.lgamma(of + 1) - math.lgamma(k + 1) - math.lgamma(of - k + 1) for k in range(least, of + 1))
    return math.fsum(math.exp(w + k * up + (of - k) * down) for k, w in enumerate(ways, least))


def verdict_on_fit(fit: lattice.Fit, experts: int, known: Sequence[float], data: dict[str, Any]) -> tuple[Verdict, str]:
    """(verdict, text) for the fit of one router's biases to a step size; figures go into `data`.

    A known rate is the one to be found. If another rate fits instead and the known one is a multiple of it, the rate
    may have been changed during training, which is no damage.
    """
    on = round(fit.share * experts)
    data.update(
        rate=fit.rate, rounding=fit.rounding, step=fit.step, on_lattice=on, worst=fit.worst, allowed=fit.allowed,
        chance=fit.chance, fits_as_well=list(fit.alike),
    )  # fmt: skip
    sure = f"chance: {fit.chance:.1g}"
    if fit.allowed > 0.2:
        return "unknown", f"cannot tell: at this size fp32 itself rounds a step of {fit.rate:g} too much"
    expected = " or ".join(f"{rate:g}" for rate in known)
    other = bool(known) and fit.rate not in known
    changed = any(round(m := rate / fit.rate) >= 1 and abs(m - round(m)) < 1e-6 for rate in known)
    if fit.distinct < ENOUGH:
        return "unknown", f"cannot tell: {fit.distinct} different values are too few"
    if fit.share == 1.0 and fit.chance > 1e-3:
        return "unknown", f"cannot tell: these values may be near whole steps of {fit.rate:g} by chance ({sure})"
    if fit.exact:
        if fit.rounding == "float32" and other:
            text = f"whole steps of {fit.rate:g} apart, not of {expected}, which was to be expected ({sure})"
            if changed:
                return "unknown", f"cannot tell: {text}: was the rate changed in between? Then give --rate for each"
            return "problem", f"{text}: another rate moved them"
        if fit.rounding == "float32":
            alike = f"; at this size steps rounded to {fit.alike[0]} would look the same" if fit.alike else ""
            return "good", f"whole steps of {fit.rate:g} apart, fp32 rounding allowed for ({sure}){alike}"
        text = (
            f"the steps are {fit.step:.7g}, which is {fit.rate:g} rounded to {fit.rounding}: the token counter was "
            f"{fit.rounding} when the updates were made, so counts were rounded and signs may be wrong ({sure})"
        )
        return "problem", text
    if fit.share == 1.0 and len(known) > 1:
        return (
            "good",
            f"whole steps of {fit.rate:g} apart to {fit.worst:.1g} of a step, as a change of rate leaves them",
        )
    if fit.share == 1.0:
        text = (
            f"near whole steps of {fit.rate:g}{f', not of {expected},' if other else ','} but off by up to "
            f"{fit.worst:.3g} of a step: updates of several sizes, or biases that were far larger once"
        )
        return "unknown" if changed or not known else "problem", text
    apart = f"{experts - on} of {experts} biases are not whole steps of {fit.rate:g} apart"
    if known:
        return "problem", f"{apart}: updates were rounded or swallowed on the way, or another rule or rate moved them"
    return "unknown", f"cannot tell: no usual rate fits ({apart}); give the right one by --rate"


def _room(tensor: RouterTensor) -> list[Finding]:
    """How many experts could still be told apart after a cast to a narrower dtype?"""
    values = tensor.values
    assert values is not None
    wide = values.astype(np.float64)
    after = {dtype: bits.distinct(bits.rounded(values.astype(np.float32), dtype)) for dtype in bits.CASTS}
    now, spread = bits.distinct(values), float(wide.max() - wide.min())
    spacing = float(np.spacing(np.float32(min(np.abs(wide).max(), 1e38))))
    lost = [f"{count} after a cast to {dtype}" for dtype, count in after.items() if count < now]
    if not lost:
        return []
    data = {
        "distinct": now,
        "distinct_after": after,
        "mean": float(wide.mean()),
        "spread": spread,
        "fp32_spacing": spacing,
    }
    text = f"mean {wide.mean():.4g}, spread {spread:.3g}; {now} different values, {', '.join(lost)}"
    return [Finding(tensor.name, "room", "note", text, data)]
