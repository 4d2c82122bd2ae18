"""Gating: logits in fp32 from the fp32 weight, forward and backward; the dispatcher gets upstream's dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch

from megatron_fp32_router.casts.router import COUNTER, below_fp32, protects_parameters
from megatron_fp32_router.gating.linear import RouterLinear
from megatron_fp32_router.patching.registry import registry, replaces

if TYPE_CHECKING:
    from megatron_fp32_router.gating.like import Mirror

#: Called with a router and its scores (those of the chosen experts), in the dtype upstream computed them in. Empty
#: unless the monitor listens to this very step.
score_watchers: list[Callable[[Any, torch.Tensor], None]] = []


#: What MEGATRON_FP32_ROUTER_LIKE said -> the engine that it names. A traced forward looks up, and reads no contract.
_mirrors: Final[dict[str, Mirror]] = {}


def mirrored() -> Mirror | None:
    """The engine that this training rounds like. None where it rounds like none, and then nothing is imported for it.

    Raises:
        NoContractError: nothing is known of the engine that was asked for.
        CannotMirrorError: not enough is.
    """
    asked = registry.settings.like
    if asked and asked not in _mirrors:
        from megatron_fp32_router.gating import like

        _mirrors[asked] = like.mirror(asked)
    return _mirrors.get(asked)


def compute_dtype(config: Any, weight: torch.Tensor) -> torch.dtype:
    """What a router's products are computed in: fp32, or fp64 where the weight or moe_router_dtype is."""
    if getattr(config, "moe_router_dtype", None) == "fp64":
        return torch.float64
    return torch.promote_types(torch.float32, weight.dtype)


def compute_in_fp32(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Router.gating: fp32 logits (fp64 where moe_router_dtype says so) for a model in bf16 or fp16.

    A model that trains in fp32 throughout has nothing to fix and keeps upstream's own gating, bit for bit.
    """
    mirrored()  # refuse an unknown engine now, and not in the first forward

    @replaces(original)
    def gating(self: Any, input: torch.Tensor) -> torch.Tensor:
        mirror = mirrored()
        config = self.config
        mixed = config.bf16 or config.fp16 or below_fp32(input.dtype)
        if not (mixed and isinstance(self, original.__globals__["TopKRouter"])):
            if mirror is not None:
                mirror.refuse(self, input)
            return original(self, input)
        weight, bias = self.weight, getattr(self, "bias", None)
        if protects_parameters() and below_fp32(weight.dtype):
            from megatron_fp32_router.casts.below import refuse

            refuse(self, "weight", "at the forward")
        # As upstream does: a router initialised on the CPU follows its input to the GPU.
        if weight.device != input.device:
            weight.data = weight.data.to(input.device)
        if bias is not None and bias.device != input.device:
            bias.data = bias.data.to(input.device)
        dtype = compute_dtype(config, weight)
        if mirror is not None:
            return mirror.logits(self, input, dtype)
        logits: torch.Tensor = RouterLinear.apply(input, weight, bias, dtype)  # type: ignore[no-untyped-call]
        return logits

    return gating


def hand_on_upstream_dtype(original: Callable[..., Any]) -> Callable[..., Any]:
    """TopKRouter.forward: choose experts in fp32, hand on the probabilities in the dtype upstream would.

    With moe_router_dtype unset that is the input's. A router that was not protected is noticed here too, in the first
    forward, before upstream silently widens a bias that has lost its bits.
    """

    @replaces(original)
    def forward(self: Any, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        for name in ("expert_bias", COUNTER):
            buffer = getattr(self, name, None)
            if buffer is not None and below_fp32(buffer.dtype):
                from megatron_fp32_router.casts.below import refuse

                refuse(self, name, "at the forward")
        if (mirror := mirrored()) is None:
            probs, *rest = original(self, input, *args, **kwargs)
        else:
            with mirror.chooses(self):
                probs, *rest = original(self, input, *args, **kwargs)
        for watcher in score_watchers:
            watcher(self, probs)
        if getattr(self.config, "moe_router_dtype", None) is None and below_fp32(input.dtype):
            probs = probs.to(input.dtype)
        return (probs, *rest)

    return forward
