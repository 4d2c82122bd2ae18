"""Whether updates of an expert_bias take effect, and how soon drift makes all biases one number in a format.

Everything is computed on the CPU from a few hundred numbers a layer. Shapes: E experts.
"""

from __future__ import annotations

import math
from typing import Final

import torch

from megatron_fp32_router.balance.update import direction

#: What a bias may be stored in or handed to.
_FORMATS: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def update(before_E: torch.Tensor, after_E: torch.Tensor, counts_E: torch.Tensor, rate: float) -> dict[str, float]:
    """What docs/monitor.md calls update/*: what one balance update should have done, and what it did.

    Args:
        before_E: the bias before the update, in its own dtype.
        after_E: the bias after it.
        counts_E: int64, tokens per expert over all ranks.
        rate: moe_router_bias_update_rate.
    """
    step_E = direction(counts_E)
    due_E = step_E != 0
    found = {"update/vote_imbalance": float(step_E.double().mean()), "update/due": float(due_E.double().mean())}
    if not due_E.any() or not rate:
        return found
    moved_E = after_E.double() - before_E.double()
    right_E = torch.add(before_E.float(), step_E.float(), alpha=rate)
    found |= {
        "update/swallowed": _share(moved_E[due_E] == 0),
        "update/reversed": _share(moved_E.sign()[due_E] == -step_E[due_E]),
        "update/inexact": _share(after_E.float() != right_E),
        "update/gain": float(moved_E.abs().sum() / (rate * due_E.sum())),
    }
    for name in ("bf16", "fp16"):
        low_E = before_E.to(_FORMATS[name])
        # As upstream computes it: the step is rounded to the bias's dtype as well.
        new_E = low_E + step_E.to(low_E.dtype) * rate
        found[f"update/swallowed_{name}"] = _share((new_E == low_E)[due_E])
    return found


def drift(bias_E: torch.Tensor, last_mean: float | None, steps: int) -> dict[str, float]:
    """What docs/monitor.md calls bias/*.

    Args:
        bias_E: the bias as it is.
        last_mean: its mean at the last look, None at the first.
        steps: steps since then.
    """
    values_E = bias_E.double()
    largest, mean = float(values_E.abs().max()), float(values_E.mean())
    spread = float(values_E.max() - values_E.min())
    found = {"bias/mean": mean, "bias/abs_max": largest, "bias/spread": spread}
    per_step = None
    if last_mean is not None and steps > 0:
        per_step = found["bias/drift_per_step"] = (mean - last_mean) / steps
    for name, dtype in _FORMATS.items():
        found[f"bias/spread_in_spacings_{name}"] = spread / spacing(largest, dtype)
        found[f"bias/distinct_{name}"] = float(len(set(bias_E.to(dtype).tolist())))
        left = steps_left(largest, mean, spread, per_step, dtype)
        if left is not None:
            found[f"bias/steps_to_blind_{name}"] = left
    return found


def steps_left(largest: float, mean: float, spread: float, per_step: float | None, dtype: torch.dtype) -> float | None:
    """Steps until a consumer in `dtype` sees one value for all experts, at the current drift and spread.

    That is when the spacing of `dtype` at the largest bias reaches the spread. None where it never does: nothing
    drifts, the bias drifts towards zero, or all biases are equal anyway.
    """
    if spread <= 0:
        return None
    if spacing(largest, dtype) >= spread:
        return 0.0
    if not per_step or per_step * mean < 0:
        return None
    # In [2^e, 2^(e+1)) the spacing is eps * 2^e.
    blind_from = 2.0 ** math.ceil(math.log2(spread / torch.finfo(dtype).eps))
    return max(0.0, min(blind_from, torch.finfo(dtype).max) - largest) / abs(per_step)


def spacing(magnitude: float, dtype: torch.dtype) -> float:
    """The distance from `magnitude` to the next larger number of `dtype`."""
    info = torch.finfo(dtype)
    return float(info.eps * 2.0 ** math.floor(math.log2(max(magnitude, info.tiny))))


def _share(mask: torch.Tensor) -> float:
    return float(mask.double().mean())
