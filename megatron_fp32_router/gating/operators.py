# No `from __future__ import annotations` here: torch reads the operators' schemas from the annotations themselves.
"""The router's products as operators that tracers do not look into, for traced programs. Imported while one is traced.

A traced program cannot call eager.py directly: switches of torch.backends cannot be turned inside a graph, and a
split kept for the step must not become a constant of one.
"""

import torch

from megatron_fp32_router.gating import eager


@torch.library.custom_op("megatron_fp32_router::logits", mutates_args=())
def logits(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return eager.logits(tokens, weight, bias, dtype)


@logits.register_fake
def _(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return tokens.new_empty((tokens.shape[0], weight.shape[0]), dtype=dtype)


@torch.library.custom_op("megatron_fp32_router::gradients", mutates_args=())
def gradients(
    grad: torch.Tensor, tokens: torch.Tensor, weight: torch.Tensor, needs_input: bool, needs_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    # An operator returns tensors: what is not wanted is an empty one.
    grad_input, grad_weight = eager.gradients(grad, tokens, weight, needs_input, needs_weight)
    return (
        tokens.new_empty((0, 0)) if grad_input is None else grad_input,
        weight.new_empty((0, 0)) if grad_weight is None else grad_weight,
    )


@gradients.register_fake
def _(
    grad: torch.Tensor, tokens: torch.Tensor, weight: torch.Tensor, needs_input: bool, needs_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        tokens.new_empty(tokens.shape if needs_input else (0, 0)),
        weight.new_empty(weight.shape if needs_weight else (0, 0)),
    )
