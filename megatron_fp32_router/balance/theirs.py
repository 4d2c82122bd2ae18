"""The balance update by somebody else's rule in the place of Megatron's. Imported only where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_fp32_router.casts.router import COUNTER


def update_by(rule: Callable[..., torch.Tensor], modules: list[Any], rate: float, group: Any, zero: bool) -> None:
    """As upstream calls a rule, with exact counts [L, E] and fp32 biases [L, E].

    Args:
        rule: get_updated_expert_bias, as it is now.
        modules: routers with the same number of experts.
        rate: moe_router_bias_update_rate.
        group: the keyword for the group to reduce over, where the rule takes one.
        zero: whether to zero the counters afterwards.
    """
    counters = [getattr(module, COUNTER) for module in modules]
    biases = [module.expert_bias for module in modules]
    torch._foreach_copy_(biases, list(rule(torch.stack(counters), torch.stack(biases), rate, **group).unbind(0)))
    if zero:
        torch._foreach_zero_(counters)
