"""get_updated_expert_bias, for those who call it by name. The step does not: update.py moves all layers at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_fp32_router.balance.update import direction, group_of
from megatron_fp32_router.casts.router import COUNTER, below_fp32
from megatron_fp32_router.patching.registry import replaces


def exact_rule(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """get_updated_expert_bias: for every caller, third parties' own update functions included.

    As upstream's, it leaves the reduced counts in `tokens_per_expert`.
    """

    @replaces(original)
    def get_updated_expert_bias(
        tokens_per_expert: torch.Tensor,
        expert_bias: torch.Tensor,
        expert_bias_update_rate: float,
        tp_dp_cp_group: Any = None,
    ) -> torch.Tensor:
        for name, tensor in (("tokens_per_expert", tokens_per_expert), ("expert_bias", expert_bias)):
            if below_fp32(tensor.dtype):
                from megatron_fp32_router.casts.below import refuse_handed

                refuse_handed(name, tensor.dtype, "expert_bias" if tensor is expert_bias else COUNTER)
        with torch.no_grad():
            counts = tokens_per_expert.to(torch.int64)
            torch.distributed.all_reduce(counts, group=group_of(tp_dp_cp_group))
            if counts is not tokens_per_expert:
                tokens_per_expert.copy_(counts)
            step = direction(counts).to(expert_bias.dtype)
            return torch.add(expert_bias, step, alpha=expert_bias_update_rate)

    return get_updated_expert_bias
