"""What a checkpoint on disk says about its routers: read without a GPU, without Megatron, without torch.

    from megatron_fp32_router.audit import audit, open_checkpoint

    found = audit(open_checkpoint("path/to/iter_0001000"))
    found.verdict          # "good", "problem" or "unknown"
    found.findings         # one record per tensor and question

It needs NumPy, ml_dtypes (bfloat16 for NumPy) and safetensors: the `audit` extra. torch is not used even for torch's
own files. They are uncompressed zip archives, in which a tensor is a range of bytes, and only the ranges that hold
routers are read. Nothing in a checkpoint is executed: see `pickles`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_fp32_router.audit.finding import Audit, Finding
    from megatron_fp32_router.audit.findings import audit
    from megatron_fp32_router.audit.formats import open_checkpoint
    from megatron_fp32_router.audit.tensors import Checkpoint, RouterTensor

_HOMES = {
    "Audit": "finding",
    "Checkpoint": "tensors",
    "Finding": "finding",
    "RouterTensor": "tensors",
    "audit": "findings",
    "open_checkpoint": "formats",
}

__all__ = ["Audit", "Checkpoint", "Finding", "RouterTensor", "audit", "open_checkpoint"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is used: its file needs NumPy, which is an extra."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
