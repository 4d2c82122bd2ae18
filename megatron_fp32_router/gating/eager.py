"""The router's products, forward and backward, in eager code: split bf16 ones or plain ones.

Which of the two is decided at each call, by device, dtypes, shape and torch version (choose.why_not), and noted for
status(). Shapes: T tokens, H hidden size, E experts.
"""

from __future__ import annotations

import torch

from megatron_fp32_router.gating import choose
from megatron_fp32_router.gating.matmul import mm
from megatron_fp32_router.patching.registry import registry


def _uses_split(tokens: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> bool:
    reason = choose.why_not(tokens.device, tokens.dtype, weight, dtype)
    registry.notes.setdefault("gating", set()).add(choose.in_words(reason))
    return not reason


def logits(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """[T, E]: `tokens @ weight.T + bias` in `dtype`, of tokens [T, H] and a weight [E, H]."""
    if _uses_split(tokens, weight, dtype):
        from megatron_fp32_router.gating import split, split_cache

        return split.logits(tokens, split_cache.parts_of(weight), weight.shape[0], bias)
    return mm(tokens.to(dtype), weight.to(dtype).t(), None if bias is None else bias.to(dtype))


def gradients(
    grad: torch.Tensor, tokens: torch.Tensor, weight: torch.Tensor, needs_input: bool, needs_weight: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Of tokens and weight, in the dtypes these have; None for what is not needed. `grad`: of the logits, [T, E]."""
    if _uses_split(tokens, weight, grad.dtype):
        from megatron_fp32_router.gating import split, split_cache

        parts = split_cache.parts_of(weight, keep=False)
        grad_input, grad_weight = split.gradients(grad, tokens, parts, needs_input, needs_weight)
    else:
        grad_input = mm(grad, weight.to(grad.dtype)).to(tokens.dtype) if needs_input else None
        grad_weight = mm(grad.t(), tokens.to(grad.dtype)) if needs_weight else None
    return grad_input, None if grad_weight is None else grad_weight.to(weight.dtype)
