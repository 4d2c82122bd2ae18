"""Write router tensors anew where the checkpoint still holds their exact values."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_fp32_router.audit import bits
from megatron_fp32_router.audit.findings import LOW
from megatron_fp32_router.errors import Fp32RouterError

if TYPE_CHECKING:
    from pathlib import Path

    from megatron_fp32_router.audit.finding import Audit


class RepairRefusedError(Fp32RouterError):
    """The repaired tensors cannot be written to the folder that was named."""


def check_target(out: Path, checkpoint: Path) -> None:
    """Refuse a folder that cannot be made or must not be used, before anything is read.

    Raises:
        RepairRefusedError: `out` exists and is not an empty folder, lies below a file or in the checkpoint's folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RepairRefusedError(f"{out}: expected no such folder, or an empty one; nothing was written")
    above = next((parent for parent in out.absolute().parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise RepairRefusedError(f"{out}: expected a folder that can be made, but {above} is a file")
    # A folder with iter_ folders is no checkpoint itself: `out` may lie beside those.
    if checkpoint.is_dir() and out.resolve().is_relative_to(checkpoint.resolve()) and not _holds_others(checkpoint):
        raise RepairRefusedError(
            f"{out}: lies in the checkpoint {checkpoint}, which stays as it is; nothing was written"
        )


def _holds_others(folder: Path) -> bool:
    return (folder / "latest_checkpointed_iteration.txt").exists() or any(folder.glob("iter_*"))


def repair(found: Audit, out: Path, *, shift_bias: bool = False) -> dict[str, Any]:
    """Write `router.safetensors` and `repair.json` into a new folder; the checkpoint stays as it is.

    A tensor is written when its values on disk are rounded and the optimizer's main copy, fp32 and not itself
    rounded, rounds to exactly these values. Names are those of the checkpoint's audit, one per router.

    Returns:
        What repair.json says: {"restored": {name: how}, "not_restored": {name: why}, "untouched": [name],
        "routers": {name: {"stack": "decoder", "layer": 3, "kind": "weight"}}}. Layers count from 0 through the whole
        model, whatever pipeline stage wrote them; stack is "decoder", "encoder" or "mtp", and "mtp.0" for the first
        depth of a HybridModel, whose layers count from 0 in each depth.

        With `shift_bias`, also "shifted": {name: the constant taken off} and "not_shifted": {name: why}: expert biases
        that serving.shift moved to where bf16 is finest.

    Raises:
        RepairRefusedError: see `check_target`.
        OSError: it cannot be written.
    """
    from safetensors.numpy import save_file

    check_target(out, found.checkpoint.path)
    restored: dict[str, str] = {}
    not_restored: dict[str, str] = {}
    untouched: list[str] = []
    tensors: dict[str, Any] = {}
    keys = Counter(tensor.key for tensor in found.checkpoint.tensors)
    for tensor in found.checkpoint.tensors:
        verdicts = {f.check: f.verdict for f in found.of(tensor.name)}
        damaged = tensor.dtype in LOW or "problem" in (verdicts.get("laundered"), verdicts.get("main copy"))
        if not damaged and "problem" not in (verdicts.get("updates"), verdicts.get("finite")):
            untouched.append(tensor.name)
            continue
        if not damaged:
            why: str | None = "its updates went wrong, and no checkpoint has the values that right ones would have made"
        elif keys[tensor.key] > 1:
            why = "another router has the same layer and kind, and the names do not say which is which"
        else:
            why = _why_not(tensor.values, tensor.main)
        if why is None:
            assert tensor.main is not None
            tensors[tensor.name] = np.ascontiguousarray(tensor.main)
            restored[tensor.name] = f"from {tensor.main_from}"
        else:
            not_restored[tensor.name] = why
    shifts: dict[str, Any] = {}
    if shift_bias:
        from megatron_fp32_router.serving.shift import shift_expert_bias

        biases = {
            t.name: t.values for t in found.checkpoint.tensors if t.kind == "expert_bias" and t.values is not None
        }
        moved, shifts = shift_expert_bias(biases)
        tensors |= {name: moved[name] for name, shift in shifts.items() if not shift.why}
    out.mkdir(parents=True, exist_ok=True)
    if tensors:
        save_file(tensors, out / "router.safetensors", metadata={"format": "pt"})
    report = {
        "checkpoint": str(found.checkpoint.path),
        "restored": restored,
        "not_restored": not_restored,
        "untouched": untouched,
        "routers": {
            tensor.name: dict(zip(("stack", "layer", "kind"), tensor.key, strict=True))
            for tensor in found.checkpoint.tensors
            if tensor.name in tensors
        },
    }
    if shift_bias:
        report["shifted"] = {name: shift.constant for name, shift in shifts.items() if not shift.why}
        report["not_shifted"] = {name: shift.why for name, shift in shifts.items() if shift.why}
    (out / "repair.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _why_not(values: Any, main: Any) -> str | None:
    """Why a main copy cannot stand in for rounded values, or None."""
    if main is None:
        return "no main copy of it in this checkpoint: buffers have none, and model-only checkpoints keep none"
    if main.dtype != np.float32:
        return f"its main copy is {main.dtype}"
    if bits.laundered(main) is not None:
        return "its main copy was made from rounded values"
    casts = [values.dtype, *bits.CASTS]
    exact = values.astype(np.float64)
    same = any(np.array_equal(bits.rounded(main, cast).astype(np.float64), exact) for cast in casts)
    return None if same else "its main copy does not round to the model's values: which is newer cannot be told"
