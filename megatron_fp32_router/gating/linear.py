# No `from __future__ import annotations` here: torch reads the operators' schemas from the annotations themselves.
"""The router's linear layer: logits forward, three gradients backward, in fp32 or in split bf16 products.

Which of the two is decided at each call, by device, dtypes, shape and torch version (choose.why_not), and noted for
status(). Eager code calls the Python functions. A traced program gets operators that tracers do not look into:
switches of torch.backends cannot be turned inside a graph, and a split kept for the step must not become a constant
of one.

Shapes: T tokens, H hidden size, E experts.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_fp32_router.gating import choose
from megatron_fp32_router.gating.matmul import mm
from megatron_fp32_router.patching.registry import registry


def _uses_split(tokens: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> bool:
    reason = choose.why_not(tokens.device, tokens.dtype, weight, dtype)
    registry.notes.setdefault("gating", set()).add(choose.in_words(reason))
    return not reason


def _logits(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    if _uses_split(tokens, weight, dtype):
        from megatron_fp32_router.gating import split, split_cache

        return split.logits(tokens, split_cache.parts_of(weight), weight.shape[0], bias)
    return mm(tokens.to(dtype), weight.to(dtype).t(), None if bias is None else bias.to(dtype))


def _gradients(
    grad: torch.Tensor, tokens: torch.Tensor, weight: torch.Tensor, needs_input: bool, needs_weight: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if _uses_split(tokens, weight, grad.dtype):
        from megatron_fp32_router.gating import split, split_cache

        parts = split_cache.parts_of(weight, keep=False)
        grad_input, grad_weight = split.gradients(grad, tokens, parts, needs_input, needs_weight)
    else:
        grad_input = mm(grad, weight.to(grad.dtype)).to(tokens.dtype) if needs_input else None
        grad_weight = mm(grad.t(), tokens.to(grad.dtype)) if needs_weight else None
    return grad_input, None if grad_weight is None else grad_weight.to(weight.dtype)


@torch.library.custom_op("megatron_fp32_router::logits", mutates_args=())
def _logits_operator(
    tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    return _logits(tokens, weight, bias, dtype)


@_logits_operator.register_fake
def _(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return tokens.new_empty((tokens.shape[0], weight.shape[0]), dtype=dtype)


@torch.library.custom_op("megatron_fp32_router::gradients", mutates_args=())
def _gradients_operator(
    grad: torch.Tensor, tokens: torch.Tensor, weight: torch.Tensor, needs_input: bool, needs_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    # An operator returns tensors: what is not wanted is an empty one.
    grad_input, grad_weight = _gradients(grad, tokens, weight, needs_input, needs_weight)
    return (
        tokens.new_empty((0, 0)) if grad_input is None else grad_input,
        weight.new_empty((0, 0)) if grad_weight is None else grad_weight,
    )


@_gradients_operator.register_fake
def _(
    grad: torch.Tensor, tokens: torch.Tensor, weight: torch.Tensor, needs_input: bool, needs_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        tokens.new_empty(tokens.shape if needs_input else (0, 0)),
        weight.new_empty(weight.shape if needs_weight else (0, 0)),
    )


def product(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """[T, E]: `tokens @ weight.T + bias` in `dtype`, in eager code or a traced program."""
    compute = _logits_operator if torch.compiler.is_compiling() else _logits
    logits: torch.Tensor = compute(tokens, weight, bias, dtype)
    return logits


def gradients(
    ctx: Any, input: torch.Tensor, weight: torch.Tensor, grad_output: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """Of input, weight and bias, in the dtypes these have; `ctx` holds `dtype` and `bias_dtype`."""
    needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_TE = grad_output.reshape(-1, weight.shape[0]).to(ctx.dtype)
    compute = _gradients_operator if torch.compiler.is_compiling() else _gradients
    tokens_TH = input.reshape(-1, input.shape[-1])
    grad_input, grad_weight = compute(grad_TE, tokens_TH, weight, needs_input, needs_weight)
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
