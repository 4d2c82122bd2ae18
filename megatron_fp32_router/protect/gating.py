"""Gating: logits in true fp32 from the fp32 weight, forward and backward; the dispatcher gets upstream's dtype.

Shapes: T tokens, H hidden size, E experts; S sequence, B batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_fp32_router.errors import UnprotectedRouterError
from megatron_fp32_router.protect.casts import COUNTER, below_fp32, protects_parameters
from megatron_fp32_router.protect.matmul import mm
from megatron_fp32_router.registry import mismatch, replaces


class _RouterLinear(torch.autograd.Function):
    """`input @ weight.T + bias` computed in `dtype`. What is saved for backward stays in the input's own dtype."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        ctx.dtype = dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        tokens_TH = input.reshape(-1, input.shape[-1]).to(dtype)
        logits_TE = mm(tokens_TH, weight.to(dtype).t(), None if bias is None else bias.to(dtype))
        return logits_TE.view(*input.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_TE = grad_outputs[0].reshape(-1, weight.shape[0]).to(ctx.dtype)
        grad_input = grad_weight = grad_bias = None
        if needs_input:
            grad_input = mm(grad_TE, weight.to(ctx.dtype)).to(input.dtype).view(input.shape)
        if needs_weight:
            tokens_TH = input.reshape(-1, input.shape[-1]).to(ctx.dtype)
            grad_weight = mm(grad_TE.t(), tokens_TH).to(weight.dtype)
        if needs_bias:
            grad_bias = grad_TE.sum(dim=0).to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, None


def _built_too_early(tensor: str, dtype: torch.dtype) -> str:
    return (
        f"router tensor {tensor!r} is {dtype}: this model was built or cast before megatron_fp32_router was active, "
        "or something has cast it since. Import the plugin before the model is built, or call "
        "megatron_fp32_router.protect_model(model) before DDP and the optimizer; "
        "MEGATRON_FP32_ROUTER_ON_MISMATCH=warn trains on as it is."
    )


def compute_in_fp32(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Router.gating: fp32 logits (fp64 where moe_router_dtype says so) for a model in bf16 or fp16.

    A model that trains in fp32 throughout has nothing to fix and keeps upstream's own gating, bit for bit.
    """

    @replaces(original)
    def gating(self: Any, input: torch.Tensor) -> torch.Tensor:
        config = self.config
        mixed = config.bf16 or config.fp16 or below_fp32(input.dtype)
        if not (mixed and isinstance(self, original.__globals__["TopKRouter"])):
            return original(self, input)
        weight, bias = self.weight, getattr(self, "bias", None)
        if protects_parameters() and below_fp32(weight.dtype):
            mismatch(UnprotectedRouterError, _built_too_early("weight", weight.dtype))
        # As upstream does: a router initialised on the CPU follows its input to the GPU.
        if weight.device != input.device:
            weight.data = weight.data.to(input.device)
        if bias is not None and bias.device != input.device:
            bias.data = bias.data.to(input.device)
        dtype = torch.promote_types(torch.float32, weight.dtype)
        if getattr(config, "moe_router_dtype", None) == "fp64":
            dtype = torch.float64
        logits: torch.Tensor = _RouterLinear.apply(input, weight, bias, dtype)  # type: ignore[no-untyped-call]
        return logits

    return gating


def hand_on_upstream_dtype(original: Callable[..., Any]) -> Callable[..., Any]:
    """TopKRouter.forward: choose experts in fp32, hand on the probabilities in the dtype upstream would.

    With moe_router_dtype unset that is the input's. The input of the first forward is also where a router that
    slipped through is noticed, before upstream quietly widens a bias that has lost its bits.
    """

    @replaces(original)
    def forward(self: Any, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        for name in ("expert_bias", COUNTER):
            buffer = getattr(self, name, None)
            if buffer is not None and below_fp32(buffer.dtype):
                mismatch(UnprotectedRouterError, _built_too_early(name, buffer.dtype))
        probs, *rest = original(self, input, *args, **kwargs)
        if getattr(self.config, "moe_router_dtype", None) is None and below_fp32(input.dtype):
            probs = probs.to(input.dtype)
        return (probs, *rest)

    return forward
