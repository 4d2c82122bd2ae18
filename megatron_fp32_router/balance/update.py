"""The balance update of auxiliary-loss-free load balancing (arXiv:2408.15664), exact.

Counts are integers through the all-reduce and the comparison, so every reduction order and every way of splitting
the same tokens over ranks gives the same bits. On the device, without a host synchronisation, with no shape that
depends on data. Shapes: L layers, E experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from megatron_fp32_router.balance.walk import counted, held, modules_of
from megatron_fp32_router.casts.router import COUNTER, below_fp32
from megatron_fp32_router.patching.owner import somebody_elses
from megatron_fp32_router.patching.registry import replaces
from megatron_fp32_router.ranks.places import agree


def direction(counts_LE: torch.Tensor) -> torch.Tensor:
    """Which way each expert's bias moves: sign(total - E·count).

    Upstream compares with the mean, total / E, in floating point: inexact, and the sign is lost where 1/E is below
    the spacing at the mean (E = 256: a mean above 131,072 in fp32).

    Args:
        counts_LE: int64 [L, E] (or [E]), tokens per expert summed over all ranks; E·count must stay below 2^63.

    Returns:
        int64 of the same shape: 1 for an expert with fewer tokens than the mean, -1 with more, 0 on it.
    """
    total = counts_LE.sum(dim=-1, keepdim=True)
    return torch.sub(total, counts_LE, alpha=counts_LE.shape[-1]).sign_()


#: Called after the biases have moved, with [(routers, their counts [L, E] over all ranks, int64), …]. Empty unless the
#: monitor looks at this very step.
watchers: list[Callable[[list[tuple[list[Any], torch.Tensor]]], None]] = []


def group_of(given: Any) -> Any:
    """The group that shares a balance update: tensor x data x context parallel, as upstream takes it."""
    if given is not None:
        return given
    from megatron.core import parallel_state

    return parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)


def exact_update(original: Callable[..., None]) -> Callable[..., None]:
    """_update_router_expert_bias: all layers at once, one collective for each number of experts.

    Which routers take part and where counters are zeroed differs between releases, and is read off upstream's code.
    Where somebody else has replaced get_updated_expert_bias, the rule that upstream calls, theirs is called.
    """
    upstream = inspect.unwrap(original)
    names, code = upstream.__globals__, upstream.__code__
    # Routers in eval mode (a distillation teacher) are left alone from 0.17 on, those with frozen_expert_bias from 0.19
    # on. Counters are zeroed here to 0.14; later by reset_model_temporary_tensors.
    training_only = "training" in code.co_names
    respects_frozen = "frozen_expert_bias" in code.co_consts
    zeroes = "zero_" in code.co_names

    @replaces(original)
    def _update_router_expert_bias(model: Any, config: Any, tp_dp_cp_group: Any = None) -> None:
        agree()  # ranks without Megatron's DDP and optimizers have not compared what they run before
        batches: dict[tuple[int, torch.dtype, torch.dtype, torch.device], list[Any]] = {}
        for module in modules_of(model):
            if not counted(module):
                continue
            if training_only and not module.training:
                continue
            if respects_frozen and held(module, "frozen_expert_bias"):
                continue
            bias, counter = held(module, "expert_bias"), held(module, COUNTER)
            for name, tensor in (("expert_bias", bias), (COUNTER, counter)):
                if below_fp32(tensor.dtype):
                    from megatron_fp32_router.casts.below import refuse

                    refuse(module, name, "at the balance update")
            batches.setdefault((bias.shape[-1], bias.dtype, counter.dtype, bias.device), []).append(module)
        rate, theirs = config.moe_router_bias_update_rate, names.get("get_updated_expert_bias")
        with torch.no_grad():
            updated = []
            for modules in batches.values():
                if theirs is not None and somebody_elses(theirs):
                    from megatron_fp32_router.balance.theirs import update_by

                    # From 0.19 on the function, and the rule that it calls, take the group to reduce over.
                    group = {"tp_dp_cp_group": tp_dp_cp_group} if "tp_dp_cp_group" in code.co_varnames else {}
                    update_by(theirs, modules, rate, group, zeroes)
                else:
                    updated.append((modules, _update(modules, rate, group_of(tp_dp_cp_group), zeroes)))
        for watcher in list(watchers):
            watcher(updated)

    return _update_router_expert_bias


def _update(modules: list[Any], rate: float, group: Any, zero: bool) -> torch.Tensor:
    counters = [held(module, COUNTER) for module in modules]
    biases = [held(module, "expert_bias") for module in modules]
    counts_LE = torch.stack(counters).to(torch.int64)
    torch.distributed.all_reduce(counts_LE, group=group)
    step_LE = direction(counts_LE).to(biases[0].dtype)
    torch._foreach_add_(biases, step_LE.unbind(0), alpha=rate)
    if zero:
        torch._foreach_zero_(counters)
    return counts_LE


def reset_in_one_go(original: Callable[..., None]) -> Callable[..., None]:
    """reset_model_temporary_tensors (0.15 and later): the same tensors, zeroed together."""

    @replaces(original)
    def reset_model_temporary_tensors(config: Any, model: Any) -> None:
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}

        def zero(tensor: torch.Tensor) -> None:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)

        balancing = config.moe_router_load_balancing_type
        for module in modules_of(model):
            if config.moe_router_enable_expert_bias and counted(module):
                zero(held(module, COUNTER))
            if "global_aux_loss" in balancing and hasattr(module, "reset_global_aux_loss_tracker"):
                module.reset_global_aux_loss_tracker()
            if held(module, "qb_beta_accum") is not None:
                zero(module.qb_beta_accum)
                zero(module.qb_beta_count)
        with torch.no_grad():
            for tensors in by_dtype.values():
                torch._foreach_zero_(tensors)

    return reset_model_temporary_tensors
