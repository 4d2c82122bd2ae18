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

import contextlib

import torch


def _reduced_precision_allowed() -> bool:
    """Whether the program lets fp32 products be computed in less than fp32."""
    for switch in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)):
        if getattr(switch, "fp32_precision", "ieee") not in ("none", "ieee"):
            return True
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        return True  # old and new switches contradict each other


def true_fp32() -> contextlib.AbstractContextManager[None]:
    """Compute fp32 matrix products in fp32 inside, and leave every switch as it was found.

    The switches belong to the process: torch has no others. Another thread that multiplies meanwhile does so in fp32
    too.
    """
    if not _reduced_precision_allowed():
        return contextlib.nullcontext()
    from megatron_fp32_router.gating import switches

    return switches.turned_off()


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
