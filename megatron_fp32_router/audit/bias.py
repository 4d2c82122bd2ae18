"""What is asked of expert biases: did updates take effect, and is there room for more?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from megatron_fp32_router.audit import bits, lattice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_fp32_router.audit.findings import Finding
    from megatron_fp32_router.audit.tensors import RouterTensor

#: Different values on one chain before chance is out of the question: one fixes its start, two confirm it.
ENOUGH: Final = 3


def questions(tensor: RouterTensor, known: Sequence[float], iteration: int | None) -> list[Finding]:
    """Answers for one finite expert_bias, [experts].

    Args:
        known: rates that the user or the checkpoint gave; the usual ones are tried otherwise.
        iteration: training steps so far, where known.
    """
    return [*_updates(tensor, known, iteration), *_room(tensor, known)]


def _updates(tensor: RouterTensor, known: Sequence[float], iteration: int | None) -> list[Finding]:
    """Are the values what whole, unrounded updates lead to?"""
    from megatron_fp32_router.audit.findings import Finding, Verdict

    values = tensor.values
    assert values is not None
    rates = [*known, *(rate for rate in lattice.USUAL_RATES if rate not in known)]
    assumed = "" if known else ", assuming a usual rate"
    data: dict[str, Any] = {"rates": list(known), "values": values.astype(float).ravel().tolist()[:1024]}

    def found(verdict: Verdict, text: str) -> list[Finding]:
        return [Finding(tensor.name, "updates", verdict, text, data)]

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
        # Its lattice is its dtype's own grid.
        step = np.abs(
            (values.astype(np.float32) + np.float32(rates[0])).astype(values.dtype).astype(float) - values.astype(float)
        )
        data["realised"] = [float(step.min()), float(step.max())]
        text = (
            f"an update of {rate} moves these biases by {step.min():.3g} to {step.max():.3g} in {tensor.dtype}{assumed}"
        )
        return found("problem" if step.max() > 1.01 * rates[0] or step.min() < 0.99 * rates[0] else "good", text)
    grid = bits.fitting(values, "bfloat16")
    if (
        grid.all_fit
        and grid.distinct >= bits.ENOUGH
        and not bits.fitting(np.array(rates[:1], np.float32), "bfloat16").all_fit
    ):
        stuck = lattice.swallowed(bits.rounded(values, bits.CASTS["bfloat16"][0]), rates[0])
        data.update(cannot_go_up=int(stuck[0].sum()), cannot_go_down=int(stuck[1].sum()))
        text = (
            f"every bias lies on bfloat16's grid, not on the steps of {rate}; held in bfloat16, "
            f"{int(stuck.any(axis=0).sum())} of {values.size} cannot take another step{assumed}"
        )
        return found("problem", text)
    found_fit = lattice.best(values, rates)
    return found(*judge(found_fit, values.size, known, data, iteration))


def judge(
    fit: lattice.Fit, experts: int, known: Sequence[float], data: dict[str, Any], iteration: int | None = None
) -> Any:
    """(verdict, text) for the fit of one router's biases to a step size; figures go into `data`."""
    on = round(fit.share * experts)
    data.update(
        rate=fit.rate, rounding=fit.rounding, step=fit.step, on_lattice=on, worst=fit.worst, allowed=fit.allowed,
        chance=fit.chance, fits_as_well=list(fit.alike),
    )  # fmt: skip
    sure = f"chance: {fit.chance:.1g}"
    if fit.allowed > 0.2:
        return "unknown", f"cannot tell: at this size fp32 itself rounds a step of {fit.rate:g} too much"
    if fit.exact and fit.distinct >= ENOUGH:
        if fit.rounding == "float32":
            said = "" if fit.rate in known or not known else f", not of {known[0]:g}, which was to be expected"
            alike = f"; at this size steps rounded to {fit.alike[0]} would look the same" if fit.alike else ""
            return "good", f"whole steps of {fit.rate:g} apart{said}, fp32 rounding allowed for ({sure}){alike}"
        text = (
            f"the steps are {fit.step:.7g}, which is {fit.rate:g} rounded to {fit.rounding}: the token counter was "
            f"{fit.rounding} when the updates were made, so counts were rounded and signs may be wrong ({sure})"
        )
        return "problem", text
    if fit.distinct < ENOUGH:
        return "unknown", f"cannot tell: {fit.distinct} different values are too few"
    if fit.share == 1.0 and len(known) > 1:
        return (
            "good",
            f"whole steps of {fit.rate:g} apart to {fit.worst:.1g} of a step, as a change of rate leaves them",
        )
    if fit.share == 1.0:
        text = f"near whole steps of {fit.rate:g}, but off by up to {fit.worst:.3g} of a step: updates of several sizes"
        return "unknown", text
    apart = f"{experts - on} of {experts} biases are not whole steps of {fit.rate:g} apart"
    if known:
        return "problem", f"{apart}: updates were rounded or swallowed on the way, or another rule or rate moved them"
    return "unknown", f"cannot tell: no usual rate fits ({apart}); --rate has it judged"


def _room(tensor: RouterTensor, known: Sequence[float]) -> list[Finding]:
    """How many experts would a consumer in a narrower dtype still tell apart?"""
    from megatron_fp32_router.audit.findings import Finding

    values = tensor.values
    assert values is not None
    wide = values.astype(np.float64)
    after = {dtype: bits.distinct(values.astype(np.float32), dtype) for dtype in bits.CASTS}
    now, spread = bits.distinct(values), float(wide.max() - wide.min())
    spacing = float(np.spacing(np.float32(min(np.abs(wide).max(), 1e38))))
    data = {
        "distinct": now,
        "distinct_after": after,
        "mean": float(wide.mean()),
        "spread": spread,
        "fp32_spacing": spacing,
    }
    text = (
        f"mean {wide.mean():.4g}, spread {spread:.3g}; {now} different values, {after['bfloat16']} after a cast to "
        f"bfloat16, {after['float16']} to float16"
    )
    return [Finding(tensor.name, "room", "note", text, data)]
