"""What the tests of the audit share: checkpoints and biases whose history is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from megatron_fp32_router.audit import Checkpoint, RouterTensor

BF16, FP16 = ml_dtypes.bfloat16, np.float16
EXPERTS = 32
NAME = "decoder.layers.0.mlp.router."


def checkpoint(values: Any, kind: str = "expert_bias", main: Any = None, **fields: Any) -> Checkpoint:
    values = np.asarray(values)
    tensor = RouterTensor(
        NAME + kind, kind, values.dtype.name, values.shape, values, main, "main" if main is not None else ""
    )
    return Checkpoint(Path("here"), "made up", [tensor], **fields)


def answer(found: Any, check: str) -> tuple[str, str]:
    (finding,) = (f for f in found.findings if f.check == check and f.tensor)
    return finding.verdict, finding.text


def walk(steps: int, rate: float, start: float = 0.0, drift: float = 0.0, seed: int = 0) -> Any:
    """What Megatron does, in fp32: `steps` additions of ±rate, each rounded."""
    random = np.random.default_rng(seed)
    bias = np.full(EXPERTS, start, np.float32)
    lean = np.linspace(-0.3, 0.3, EXPERTS)
    for _ in range(steps):
        bias = bias + np.sign(random.random(EXPERTS) - 0.5 + lean + drift).astype(np.float32) * np.float32(rate)
    return bias


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
