"""The router's three products on bf16 tensor cores, in fp32's class of accuracy.

An fp32 number has 24 bits of significand, a bf16 number 8: rounding to nearest, taking the rest and rounding again
writes every fp32 number as the sum of three bf16 numbers, exactly. A product of two bf16 numbers has 16 bits and
is exact in the fp32 accumulators of a tensor core. So with bf16 activations x and an fp32 weight W = lo + mid + hi,

    logits      = x @ [lo; mid; hi].T, its three blocks summed            x is read once
    grad_weight = [g_hi | g_mid | g_lo].T @ x, its three blocks summed    x is read once; g is the gradient, fp32
    grad_input  = [g_hi g_mid g_lo  g_hi g_mid  g_hi] @ [lo; mid; hi;  mid; hi;  hi]

the last as one product over 6 E, smallest terms first, which leaves the accumulators in bf16. Nothing of the size of
the activations is ever held in fp32, forward or backward.

Bounds, beside the fp32 accumulation that a true fp32 product has too, for finite numbers:

- logits, grad_weight: every product is exact where the number that is split is 0 or at least 2^-110. Below that, the
  last bits fall under bf16's smallest subnormal: at most 2^-134 is lost of each such number.
- grad_input leaves out g_mid·lo, g_lo·mid and g_lo·lo: at most 2^-24 (1 + 2^-8) |g·W| a product, half a unit in
  fp32's last place (the choice of terms: arXiv:1904.06376, section 2).
- Above bf16's largest number (3.3895e38) hi is that number and mid takes the rest: still exact.
- What is not finite in the operands is not finite in the results; an infinity can become NaN.

torch.mm(out_dtype=…) exists for CUDA only. On a CPU the same arithmetic is emulated, product for product (bf16
numbers are multiplied as fp32 numbers, which is exact): for tests and tables, and for a training only where
MEGATRON_FP32_ROUTER_PRODUCTS=split asks for it.

Shapes: T tokens, H hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from megatron_fp32_router.gating.matmul import true_fp32

_LARGEST: Final = torch.finfo(torch.bfloat16).max

#: Device -> why it cannot, or "" when it can.
_devices: dict[torch.device, str] = {}


# Products --------------------------------------------------------------------------------------------------------


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Sums of bf16 products stay in fp32 accumulators inside, and autocast stays out; every switch is put back."""
    if device.type == "cpu":
        with true_fp32(), torch.autocast("cpu", enabled=False):
            yield
        return
    switches = torch.backends.cuda.matmul
    allowed = switches.allow_bf16_reduced_precision_reduction
    if allowed:
        # Partial sums of a product that was cut along its inner dimension would be added in bf16.
        switches.allow_bf16_reduced_precision_reduction = False
    try:
        with torch.autocast("cuda", enabled=False):
            yield
    finally:
        if allowed:
            switches.allow_bf16_reduced_precision_reduction = True


def to_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` of bf16 matrices, in fp32."""
    if a.device.type == "cpu":
        return torch.mm(a.float(), b.float())
    return torch.mm(a, b, out_dtype=torch.float32)


def _to_bf16(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` of bf16 matrices, summed in fp32 and rounded once, to bf16."""
    if a.device.type == "cpu":
        return torch.mm(a.float(), b.float()).bfloat16()
    return torch.mm(a, b)


def _split(number: torch.Tensor, lo: torch.Tensor, mid: torch.Tensor, hi: torch.Tensor) -> None:
    """Write fp32 `number` into three bf16 tensors of its shape: number == lo + mid + hi."""
    hi.copy_(number)
    hi.clamp_(-_LARGEST, _LARGEST)  # fp32's last 2^-9 above bf16's largest number rounds to infinity
    rest = number - hi
    mid.copy_(rest)
    torch.sub(rest, mid, out=lo)  # exact: a bf16 number


def split_weight(weight_EH: torch.Tensor) -> torch.Tensor:
    """bf16 [3 E, H]: the rows lo, mid, hi of an fp32 weight. A bf16 weight is its own split: [E, H]."""
    weight_EH = weight_EH.detach()
    if weight_EH.dtype == torch.bfloat16:
        return weight_EH
    parts = weight_EH.new_empty((3, *weight_EH.shape), dtype=torch.bfloat16)
    _split(weight_EH, *parts)
    return parts.view(-1, weight_EH.shape[1])


def split_gradient(grad_TE: torch.Tensor, terms: int) -> torch.Tensor:
    """bf16 [T, terms E]: the columns hi, mid, lo and, for 6 terms, hi, mid and hi once more."""
    experts = grad_TE.shape[1]
    parts = grad_TE.new_empty((grad_TE.shape[0], terms * experts), dtype=torch.bfloat16)
    hi, mid, lo = torch.split(parts[:, : 3 * experts], experts, dim=1)
    _split(grad_TE, lo, mid, hi)
    if terms == 6:
        parts[:, 3 * experts : 5 * experts].copy_(parts[:, : 2 * experts])
        parts[:, 5 * experts :].copy_(hi)
    return parts


def logits(tokens_TH: torch.Tensor, parts: torch.Tensor, experts: int, bias_E: torch.Tensor | None) -> torch.Tensor:
    """Router logits.

    Args:
        tokens_TH: bf16 [T, H].
        parts: of the weight, as `split_weight` makes them.
        experts: E.
        bias_E: [E], or None.

    Returns:
        fp32 [T, E].
    """
    if not tokens_TH.shape[0]:
        return tokens_TH.new_zeros((0, experts), dtype=torch.float32)
    with exact_products(tokens_TH.device):
        out = to_fp32(tokens_TH, parts.t())
    if out.shape[1] != experts:
        out = out.view(-1, 3, experts).sum(dim=1)
    return out if bias_E is None else out.add_(bias_E.float())


def gradients(
    grad_TE: torch.Tensor, tokens_TH: torch.Tensor, parts: torch.Tensor, needs_input: bool, needs_weight: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What `logits` hands back, without the bias.

    Args:
        grad_TE: fp32 [T, E], the gradient of the logits.
        tokens_TH: bf16 [T, H].
        parts: of the weight, as `split_weight` makes them.
        needs_input: whether the first result is wanted.
        needs_weight: whether the second one is.

    Returns:
        The gradient of the input, bf16 [T, H], and of the weight, fp32 [E, H]; None for what is not wanted.
    """
    (tokens, hidden), experts = tokens_TH.shape, grad_TE.shape[1]
    grad_input = grad_weight = None
    if not tokens:
        if needs_input:
            grad_input = torch.zeros_like(tokens_TH)
        if needs_weight:
            grad_weight = grad_TE.new_zeros((experts, hidden))
        return grad_input, grad_weight
    whole = parts.shape[0] == experts  # a bf16 weight, in one part
    with exact_products(grad_TE.device):
        split_grad = split_gradient(grad_TE, 6 if needs_input and not whole else 3)
        if needs_input:
            pieces = [parts] * 3 if whole else [parts, parts[experts:], parts[2 * experts :]]
            grad_input = _to_bf16(split_grad, torch.cat(pieces))
        if needs_weight:
            out = to_fp32(split_grad[:, : 3 * experts].t(), tokens_TH)
            grad_weight = out.view(3, experts, hidden).sum(dim=0)
    return grad_input, grad_weight


# Trying ----------------------------------------------------------------------------------------------------------


def tried(device: torch.device) -> str:
    """Why a CUDA device cannot do it; "" when it can."""
    if device not in _devices:
        if torch.cuda.is_current_stream_capturing():
            return "the device was not tried before graph capture"
        _devices[device] = _trial(device)
    return _devices[device]


def _trial(device: torch.device) -> str:
    """Try one small product whose result bf16 cannot hold. Synchronises with the device; done once for each."""
    if not hasattr(torch.ops.aten.mm, "dtype"):
        return f"torch {torch.__version__} has no mm(out_dtype=...); 2.8 has"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has no bf16 tensor cores"
    with torch.no_grad(), exact_products(device):
        x = torch.full((16, 16), 1 + 2.0**-7, dtype=torch.bfloat16, device=device)
        try:
            exact = bool((torch.mm(x, x.t(), out_dtype=torch.float32) == 16 * (1 + 2.0**-7) ** 2).all())
        except (RuntimeError, TypeError) as error:  # NotImplementedError is a RuntimeError
            return f"mm(out_dtype=...) fails on this device: {str(error).splitlines()[0]}"
    return "" if exact else "mm(out_dtype=...) rounds on this device"
