"""The router's linear layer: logits forward, three gradients backward, in fp32 or in split bf16 products.

Eager code calls eager.py; a traced program gets the operators of operators.py.

Shapes: T tokens, H hidden size, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_fp32_router.gating import eager


def _products() -> Any:
    """eager.py, or for a traced program the operators that are made of it."""
    if torch.compiler.is_compiling():
        from megatron_fp32_router.gating import operators

        return operators
    return eager


def product(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """[T, E]: `tokens @ weight.T + bias` in `dtype`, in eager code or a traced program."""
    logits: torch.Tensor = _products().logits(tokens, weight, bias, dtype)
    return logits


def gradients(
    ctx: Any, input: torch.Tensor, weight: torch.Tensor, grad_output: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """Of input, weight and bias, in the dtypes these have; `ctx` holds `dtype` and `bias_dtype`."""
    needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_TE = grad_output.reshape(-1, weight.shape[0]).to(ctx.dtype)
    tokens_TH = input.reshape(-1, input.shape[-1])
    grad_input, grad_weight = _products().gradients(grad_TE, tokens_TH, weight, needs_input, needs_weight)
    return (
        grad_input.view(input.shape) if needs_input and grad_input is not None else None,
        grad_weight if needs_weight else None,
        grad_TE.sum(dim=0).to(ctx.bias_dtype) if needs_bias else None,
    )


class RouterLinear(torch.autograd.Function):
    """`input @ weight.T + bias` computed in `dtype`. What is saved for backward is the input, in its own dtype."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        ctx.dtype = dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        logits_TE = product(input.reshape(-1, input.shape[-1]), weight, bias, dtype)
        return logits_TE.view(*input.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        return (*gradients(ctx, input, weight, grad_outputs[0]), None)
