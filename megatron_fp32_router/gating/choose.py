"""Whether a router's products are split bf16 ones or plain ones: by device, dtypes, shape and torch version.

split.py is imported only where they may be split.
"""

from __future__ import annotations

from typing import Final

import torch

from megatron_fp32_router.errors import SettingsError
from megatron_fp32_router.patching.registry import registry
from megatron_fp32_router.settings import PREFIX

#: Why a CPU's products are plain ones, unless emulation is asked for.
_EMULATED: Final = "cpu has no bf16 product with fp32 output"


def in_words(reason: str) -> str:
    """What products are used when split ones are not, because of `reason`; "" when they are."""
    return f"plain products: {reason}" if reason else "split bf16 products"


def why_not(device: torch.device, activations: torch.dtype, weight: torch.Tensor, dtype: torch.dtype) -> str:
    """Why split products are not used for these tensors; "" when they are.

    Args:
        device: where the activations lie.
        activations: their dtype.
        weight: [E, H].
        dtype: what the products have to be computed in.

    Raises:
        SettingsError: MEGATRON_FP32_ROUTER_PRODUCTS=split asks for them, and they cannot be had.
    """
    asked = registry.settings.products
    if asked == "fp32":
        return f"{PREFIX}_PRODUCTS=fp32"
    reason = unfit(device, activations, weight, dtype)
    if asked == "split":
        if reason == _EMULATED:
            return ""
        if reason:
            raise SettingsError(
                f"{PREFIX}_PRODUCTS=split: expected routers whose products can be split, found that {reason}. "
                f"Unset it, or set {PREFIX}_PRODUCTS=fp32: both are as exact."
            )
    return reason


def unfit(device: torch.device, activations: torch.dtype, weight: torch.Tensor, dtype: torch.dtype) -> str:
    """What is in the way, whatever was asked for."""
    if dtype != torch.float32:
        return f"products are {_name(dtype)}"
    if activations != torch.bfloat16:
        return f"activations are {_name(activations)}, not bfloat16"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"the weight is {_name(weight.dtype)}"
    if device.type == "cpu":
        return _EMULATED
    if device.type != "cuda":
        return f"{device.type} has no bf16 product with fp32 output"
    if weight.shape[0] % 8 or weight.shape[1] % 8:
        # 16 bytes, what tensor cores want of a row.
        return f"{weight.shape[0]} experts x hidden {weight.shape[1]} are not multiples of 8"
    from megatron_fp32_router.gating import split

    return split.tried(device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
