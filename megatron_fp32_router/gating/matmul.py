"""A matrix product in true fp32, whatever the program set: TF32, bf16x1 and autocast do not reach it.

Why that holds on a GPU. PyTorch decides about TF32 anew in every product: ATen/cuda/CublasHandlePool.cpp gives the
cuBLAS handle CUBLAS_TF32_TENSOR_OP_MATH where the switch for CUDA's matrix products says so, and CUBLAS_DEFAULT_MATH
elsewhere; ATen/cuda/CUDABlas.cpp (gemm_and_bias, which addmm may take) asks cublasLt for CUBLAS_COMPUTE_32F_FAST_TF32
or CUBLAS_COMPUTE_32F by the same switch. NVIDIA's manual of cuBLAS says of DEFAULT_MATH and COMPUTE_32F that they
compute with at least as many bits as were asked for: fp32, not TF32. So the switch is turned off for the one call.
Turning it costs no kernel and no synchronisation, and a CUDA graph keeps the kernels that were chosen.

torch.backends.cuda.matmul.allow_tf32, .fp32_precision, torch.set_float32_matmul_precision and
TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 (which NVIDIA's containers set) are that switch, or what it starts with.
`doctor --device` measures on the GPU at hand what is said here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _reduced_precision_allowed() -> bool:
    """Whether fp32 products may be computed in less. Reading can fail where old and new switches contradict."""
    matmul = torch.backends.cuda.matmul
    mkldnn = getattr(torch.backends.mkldnn, "matmul", None)
    exact = ("none", "ieee")
    if getattr(matmul, "fp32_precision", "ieee") not in exact:
        return True
    if getattr(mkldnn, "fp32_precision", "ieee") not in exact:
        return True
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        return True


@contextmanager
def true_fp32() -> Iterator[None]:
    """Compute fp32 matrix products in fp32 inside, and leave every switch as it was found.

    The switches are the process's: torch has no others. Another thread that multiplies meanwhile does so in fp32 too.
    """
    if not _reduced_precision_allowed():
        yield
        return
    candidates: list[tuple[Any, Any]] = [
        (torch.backends.cuda.matmul, torch.backends),
        (getattr(torch.backends.mkldnn, "matmul", None), torch.backends.mkldnn),
    ]
    places = [(place, above) for place, above in candidates if hasattr(place, "fp32_precision")]
    # A switch without a value of its own reads as the one above it. It must go on following that one.
    saved = [
        "none" if place.fp32_precision == getattr(above, "fp32_precision", None) else place.fp32_precision
        for place, above in places
    ]
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:
        legacy = "highest"  # contradictory switches; the new ones are restored below as they were
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(legacy)
        for (place, _), value in zip(places, saved, strict=True):
            place.fp32_precision = value


def mm(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`a @ b (+ bias)`.

    Args:
        a: [M, K], fp32 or fp64.
        b: [K, N], the same dtype.
        bias: [N], the same dtype, or None.

    Returns:
        [M, N] in the same dtype, computed in it.
    """
    with true_fp32(), torch.autocast(a.device.type, enabled=False):
        return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


def tf32(t: torch.Tensor) -> torch.Tensor:
    """`t` rounded to TF32's 11 bits of significand, as a GPU rounds operands: for emulation, never a training."""
    return ((t.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
