"""The audit's answers: a Finding for each question and tensor, and the Audit that holds them all."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from megatron_fp32_router.audit.tensors import Checkpoint

#: "note": true and worth knowing, but no verdict.
Verdict = Literal["good", "problem", "unknown", "note"]

#: All questions that the audit asks; docs/audit.md says what each means.
Check = Literal["dtype", "finite", "laundered", "updates", "room", "main copy", "against", "serving"]


@dataclass(frozen=True)
class Finding:
    """One answer. `data`: the figures that `text` is made of, for programs."""

    tensor: str
    check: Check
    verdict: Verdict
    text: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass
class Audit:
    """All answers for one checkpoint."""

    checkpoint: Checkpoint
    findings: list[Finding]
    #: The one it was compared with.
    against: Checkpoint | None = None

    @property
    def verdict(self) -> Literal["good", "problem", "unknown"]:
        """ "problem" if there is one; "unknown" if something could not be told, or there is no router; else "good"."""
        verdicts = {finding.verdict for finding in self.findings}
        if "problem" in verdicts:
            return "problem"
        return "unknown" if "unknown" in verdicts or not self.checkpoint.tensors else "good"

    @property
    def exit_code(self) -> int:
        """0 good, 1 a problem was found, 2 could not tell."""
        return {"good": 0, "problem": 1, "unknown": 2}[self.verdict]

    def of(self, tensor: str) -> list[Finding]:
        """The answers for one tensor."""
        return [finding for finding in self.findings if finding.tensor == tensor]

    def to_json(self) -> dict[str, Any]:
        """As plain values: what `audit --json` prints."""
        names = {tensor.name for tensor in self.checkpoint.tensors}
        plain: dict[str, Any] = _plain(
            {
                "checkpoint": _describe(self.checkpoint),
                "against": None if self.against is None else _describe(self.against),
                "verdict": self.verdict,
                "tensors": [
                    {
                        "name": tensor.name,
                        "kind": tensor.kind,
                        "layer": tensor.key[1],
                        "dtype": tensor.dtype,
                        "shape": list(tensor.shape),
                        "main_copy": tensor.main_from or None,
                        "findings": [
                            {k: v for k, v in asdict(finding).items() if k != "tensor"}
                            for finding in self.of(tensor.name)
                        ],
                    }
                    for tensor in self.checkpoint.tensors
                ],
                "other_findings": [asdict(finding) for finding in self.findings if finding.tensor not in names],
            }
        )
        return plain


def _plain(value: Any) -> Any:
    """As JSON can hold it: no NumPy numbers, and null for NaN and infinity."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _describe(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "iteration": checkpoint.iteration,
        "rate": checkpoint.rate,
        "bytes_read": checkpoint.bytes_read,
        "bytes_on_disk": checkpoint.bytes_on_disk,
        "notes": checkpoint.notes,
    }
