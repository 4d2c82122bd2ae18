"""The questions that are asked of every router tensor, and the answers with their reasons."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from megatron_fp32_router.audit import bits, compare, expert_bias
from megatron_fp32_router.audit.finding import Audit, Finding
from megatron_fp32_router.audit.tensors import PARAMETERS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_fp32_router.audit.tensors import Checkpoint, RouterTensor

LOW: Final = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


def audit(
    checkpoint: Checkpoint,
    against: Checkpoint | None = None,
    *,
    rates: Sequence[float] = (),
    protect: Literal["all", "buffers"] = "all",
) -> Audit:
    """Ask every question of every router tensor.

    Args:
        checkpoint: from `open_checkpoint`.
        against: an earlier or later checkpoint of the same run, or an export of it.
        rates: moe_router_bias_update_rate, where the checkpoint does not say; several if it changed.
        protect: "buffers": parameters in low precision are what was asked for, and no problem.
    """
    others = {} if against is None else {tensor.key: tensor for tensor in against.tensors}
    findings: list[Finding] = []
    known = list(rates) or [c.rate for c in (checkpoint, against) if c is not None and c.rate is not None][:1]
    for tensor in checkpoint.tensors:
        other = others.get(tensor.key)
        same = other is not None and compare.identical(tensor, other)
        findings.append(_dtype(tensor, protect))
        if tensor.values is None:
            continue
        if tensor.values.size == 0:
            findings.append(Finding(tensor.name, "dtype", "unknown", "it has no elements"))
            continue
        finite = _finite(tensor)
        if finite is not None:
            findings.append(finite)
            continue
        if tensor.dtype in ("float32", "float64") and tensor.kind in ("weight", "bias", "expert_bias", "qb_beta"):
            findings.append(_laundered(tensor, known, same))
        if tensor.kind == "expert_bias":
            findings += _of_a_bias(tensor, known)
        if tensor.main is not None:
            findings.append(_main_copy(tensor))
    if against is not None:
        findings += compare.questions(checkpoint, against, known)
    if not checkpoint.tensors:
        findings.append(Finding("", "dtype", "unknown", "no tensor here has a router's name, so nothing was checked"))
    findings += [Finding("", "main copy", "note", note) for note in checkpoint.notes]
    return Audit(checkpoint, findings, against)


def _of_a_bias(tensor: RouterTensor, known: Sequence[float]) -> list[Finding]:
    """Updates and room of an expert_bias, if its dtype is one whose steps are known."""
    values = tensor.values
    assert values is not None
    if tensor.dtype in (*LOW, "float32"):
        return expert_bias.questions(tensor, known)
    if tensor.dtype != "float64":
        return []
    narrow = values.astype(np.float32)
    if np.array_equal(narrow.astype(np.float64), values):
        # Steps in fp32, stored in a wider dtype.
        return expert_bias.questions(replace(tensor, dtype="float32", values=narrow), known)
    return [Finding(tensor.name, "updates", "unknown", "cannot tell: its values need more than float32")]


def _dtype(tensor: RouterTensor, protect: str) -> Finding:
    """Is it stored in fp32 or better?"""
    data = {"dtype": tensor.dtype, "shape": list(tensor.shape)}
    found = partial(Finding, tensor.name, "dtype", data=data)
    parameter = tensor.kind in PARAMETERS
    if tensor.dtype in LOW:
        if parameter and protect == "buffers":
            return found("note", f"{tensor.dtype} on disk, as PROTECT=buffers leaves parameters")
        kept = "; its fp32 main copy is in this checkpoint" if tensor.main is not None else ""
        return found("problem", f"{tensor.dtype} on disk: every value is rounded{kept}")
    if tensor.dtype.startswith("int") and tensor.kind in ("expert_bias", "qb_beta"):
        return found("problem", f"{tensor.dtype} on disk: whole numbers, to which no rate below 1 can be added")
    if tensor.dtype == "float64":
        return found("good", "float64 on disk: more than fp32, which no release of Megatron makes")
    if tensor.dtype == "float32" or (tensor.dtype.startswith("int") and not parameter):
        return found("good", f"{tensor.dtype} on disk")
    return found("unknown", f"{tensor.dtype} on disk: not a dtype that a router is kept in; quantised?")


def _finite(tensor: RouterTensor) -> Finding | None:
    values = tensor.values
    assert values is not None
    broken = int(values.size - np.isfinite(values.astype(np.float64)).sum())
    if not broken:
        return None
    text = f"{broken} of {values.size} values are NaN or infinite; no other question was asked"
    return Finding(tensor.name, "finite", "problem", text, {"not_finite": broken})


def _laundered(tensor: RouterTensor, rates: Sequence[float], same: bool) -> Finding:
    """Is it fp32 in name only: has every value been through bf16 or fp16?"""
    values = tensor.values
    assert values is not None
    # Only an expert_bias is made of steps of the rate.
    counts = [bits.fitting(values, dtype, rates if tensor.kind == "expert_bias" else ()) for dtype in bits.CASTS]
    data: dict[str, Any] = {"counts": [asdict(count) for count in counts]}
    found = partial(Finding, tensor.name, "laundered", data=data)
    if counts[0].nonzero == 0:
        return found("unknown", "cannot tell: every value is zero, which every dtype holds")
    count = next((c for c in counts if c.all_fit), None)
    if count is None:
        partly = next((c for c in counts if c.improbable), None)
        if partly is not None:
            share = f"{partly.fitting:,} of {partly.nonzero:,} values fit {partly.dtype} ({partly.chance})"
            return found("note", f"not laundered as a whole, but {share}: most of these were cast")
        return found(
            "good", f"{counts[0].nonzero - counts[0].fitting:,} of {counts[0].nonzero:,} values need more than bfloat16"
        )
    if count.distinct < bits.ENOUGH:
        sizes = "one size" if count.distinct == 1 else f"{count.distinct} sizes"
        return found("unknown", f"cannot tell: all values fit {count.dtype}, but they have only {sizes}")
    if same:
        return found(
            "unknown", f"cannot tell: all values fit {count.dtype}, but they are the same in the other checkpoint"
        )
    if not count.improbable:
        text = f"cannot tell: all values fit {count.dtype}, as few steps of one size also do ({count.chance})"
        return found("unknown", text)
    text = (
        f"{tensor.dtype} in name only: all {count.nonzero:,} nonzero values fit {count.dtype} ({count.chance}), "
        "so they were rounded to it, or to something coarser"
    )
    return found("problem", text)


def _main_copy(tensor: RouterTensor) -> Finding:
    """The optimizer's copy and the model's: which one is exact, and how far apart are they?"""
    values, main = tensor.values, tensor.main
    assert values is not None
    assert main is not None
    if not np.isfinite(main.astype(np.float64)).all():
        return Finding(tensor.name, "main copy", "problem", "the main copy has values that are NaN or infinite")
    gap = np.abs(main.astype(np.float64) - values.astype(np.float64))
    apart, largest = int((gap > 0).sum()), float(gap.max(initial=0.0))
    data: dict[str, Any] = {"main_copy": tensor.main_from, "differ": apart, "largest": largest}
    found = partial(Finding, tensor.name, "main copy", data=data)
    hidden = bits.rounded(main, values.dtype)
    far = f"{apart:,} of {gap.size:,} values differ, by up to {largest:.3g}"
    cast = bits.laundered(main)
    data["main_laundered"] = None if cast is None else cast.dtype
    if cast is not None and main.dtype == np.float32:
        text = f"the main copy itself fits {cast.dtype} ({cast.chance}): it was made from a rounded weight; {far}"
        return found("problem", text)
    if not apart:
        return found("good", "the main copy and the model's weight are the same, bit for bit")
    if tensor.dtype in LOW and np.array_equal(hidden, values):
        return found("note", f"the main copy is the truth, the model holds it rounded: {far}; --repair writes it")
    for dtype in bits.CASTS:
        if np.array_equal(bits.rounded(main, dtype).astype(np.float64), values.astype(np.float64)):
            text = (
                f"the model's {tensor.dtype} weight is the main copy rounded to {dtype}: {far}; the copy is the truth"
            )
            return found("problem", text)
    text = f"neither is the other rounded to the nearest, so one is stale, or was rounded in another way: {far}"
    return found("problem", text)
