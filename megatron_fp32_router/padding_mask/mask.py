"""Padding tokens are taken out of the token counts, one row of the routing map for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_fp32_router.patching.registry import replaces


def mask_padding_per_token(original: Callable[..., None]) -> Callable[..., None]:
    """TopKRouter._apply_expert_bias (0.16 and later): padding tokens are taken out before upstream counts.

    Upstream to 0.19 broadcasts the [T] mask along experts of the [T, E] map (#6111).
    """

    @replaces(original)
    def _apply_expert_bias(
        self: Any, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> None:
        if padding_mask is not None and routing_map.dtype == torch.bool and padding_mask.dim() < routing_map.dim():
            routing_map = routing_map & ~padding_mask.unsqueeze(-1)
            padding_mask = None
        original(self, routing_map, padding_mask, *args, **kwargs)

    return _apply_expert_bias
