"""Two checkpoints: what moved between them, what did not, and by which steps."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_fp32_router.audit import bits, expert_bias, lattice
from megatron_fp32_router.audit.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from megatron_fp32_router.audit.tensors import Checkpoint, RouterTensor


def identical(one: RouterTensor, other: RouterTensor) -> bool:
    """Whether two tensors have the same dtype and the same bits."""
    if one.values is None or other.values is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.values.tobytes() == other.values.tobytes()


def questions(one: Checkpoint, other: Checkpoint, known: Sequence[float]) -> list[Finding]:
    """One answer per router tensor of either checkpoint."""
    others, found = {tensor.key: tensor for tensor in other.tensors}, []
    between = None
    if one.iteration is not None and other.iteration is not None:
        between = abs(one.iteration - other.iteration)
    for tensor in one.tensors:
        partner = others.pop(tensor.key, None)
        if partner is None:
            found.append(Finding(tensor.name, "against", "unknown", f"{other.path} has no such tensor"))
        elif tensor.values is None or partner.values is None or tensor.shape != partner.shape:
            text = f"cannot be compared: {tensor.dtype} {tensor.shape} here, {partner.dtype} {partner.shape} there"
            found.append(Finding(tensor.name, "against", "unknown", text))
        else:
            found.append(_moved(tensor, partner, between, known))
            if one.format != other.format and None in (one.iteration, other.iteration) and identical(tensor, partner):
                # An export does not say its iteration. Equal values are what it should have, not a lack of updates.
                text = f"the same {partner.values.size:,} values, bit for bit"
                found[-1] = Finding(tensor.name, "against", "note", text, found[-1].data)
    found += [Finding(t.name, "against", "unknown", f"{one.path} has no such tensor") for t in others.values()]
    return found


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    """Pearson's correlation of all elements; None where one of the two has the same value everywhere."""
    a, b = a.ravel() - a.mean(), b.ravel() - b.mean()
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size and np.isfinite(size) else None


def _moved(one: RouterTensor, other: RouterTensor, between: int | None, known: Sequence[float]) -> Finding:
    assert one.values is not None
    assert other.values is not None
    a, b = one.values.astype(np.float64), other.values.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Finding(one.name, "against", "unknown", "cannot tell: not every value is finite")
    moved = int((a != b).sum())
    largest = float(np.abs(a - b).max(initial=0.0))
    data: dict[str, Any] = {"moved": moved, "of": a.size, "largest": largest, "iterations": between}
    over = "" if between is None else f" in {between} iterations"
    found = partial(Finding, one.name, "against", data=data)
    if moved == 0 and not between:
        return found("note", f"the same {a.size:,} values" + (", of the same iteration" if between == 0 else ""))
    if moved and one.dtype != other.dtype:
        low, high = sorted((one, other), key=lambda t: t.dtype in ("float32", "float64"))
        assert low.values is not None
        assert high.values is not None
        if np.array_equal(bits.rounded(high.values, low.values.dtype), low.values):
            data["rounded"] = low.dtype
            return found("problem", f"the same values, rounded from {high.dtype} to {low.dtype} in one of the two")
        if between != 0:
            return found("note", f"{moved:,} of {a.size:,} values moved{over}, by up to {largest:.3g}; dtypes differ")
    if between == 0:
        alike = _correlation(a, b)
        data["correlation"] = alike
        text = f"both are of the same iteration, but {moved:,} of {a.size:,} values differ, by up to {largest:.3g}"
        said = "" if alike is None else f"; correlation {alike:.2f}"
        return found("unknown", f"cannot tell: {text}{said}: of another run or model, or changed since")
    if one.kind != "expert_bias":
        if moved:
            text = f"{moved:,} of {a.size:,} values moved{over}, by up to {largest:.3g}"
            alike = _correlation(a, b) if a.size >= 64 else None
            if alike is not None and abs(alike) < 0.5:
                text += f"; correlation {alike:.2f}: after a long training, or of another model"
            return found("note", text)
        return found("note", f"none of {a.size:,} values moved{over}: frozen?")
    rates = list(known) or list(lattice.USUAL_RATES)
    if not moved:
        stuck = int(lattice.swallowed(one.values, lattice.rounded(rates[0], "float32")).all(axis=0).sum())
        data["swallowing"] = stuck
        if stuck:
            text = f"{stuck} of {a.size} are so large that {one.dtype} rounds a step of {rates[0]:g} away"
            return found("problem", f"no bias moved{over}: {text}")
        return found("unknown", f"no bias moved{over}: updates were off, or had no effect")
    if one.dtype != "float32":
        return found(
            "note", f"{moved} of {a.size} biases moved{over}, by up to {largest:.3g}, on {one.dtype}'s own grid"
        )
    fit = expert_bias.fitted(one.values, known, other.values)
    verdict, text = expert_bias.verdict_on_fit(fit, a.size, known, data)
    count = np.abs(lattice.steps(one.values, fit.step) - lattice.steps(other.values, fit.step))
    data["net_steps"] = float(np.nan_to_num(count).max(initial=0.0))
    text = f"{moved} of {a.size} biases moved{over}, by up to {round(data['net_steps'])} steps; {text}"
    # With a smaller rate, a step of the largest one would count as several.
    certain = fit.exact and bool(known) and fit.rate == max(known)
    if certain and between is not None and round(data["net_steps"]) > between:
        return found("problem", f"{text}; but that is more steps than iterations")
    return found(verdict, text)
