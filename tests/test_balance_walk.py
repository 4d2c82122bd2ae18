"""How the balance update finds its routers: as torch's own look-ups would, and quicker."""

from __future__ import annotations

import torch

from megatron_fp32_router.balance.walk import counted, held, modules_of
from megatron_fp32_router.casts.router import COUNTER


class WithProperty(torch.nn.Module):
    @property
    def expert_bias(self) -> torch.Tensor:
        return torch.ones(2)


def test_modules_come_in_torchs_own_order_and_each_once() -> None:
    shared = torch.nn.Linear(1, 1)
    block = torch.nn.Sequential(torch.nn.ModuleList([shared, torch.nn.ReLU()]), torch.nn.ModuleDict({"a": shared}))
    block.register_module("none", None)
    model = torch.nn.ModuleList([block, torch.nn.Sequential(block, shared)])
    assert [*modules_of([model])] == [*model.modules()]
    assert [*modules_of([model, shared])] == [*model.modules(), shared]


def test_a_bias_is_found_wherever_a_router_may_keep_it() -> None:
    bias = torch.zeros(2)
    buffer, attribute, parameter, empty = (torch.nn.Module() for _ in range(4))
    buffer.register_buffer("expert_bias", bias)
    attribute.expert_bias = bias
    parameter.expert_bias = torch.nn.Parameter(bias)
    for module in (buffer, attribute, parameter, WithProperty()):
        assert held(module, "expert_bias") is not None
        assert not counted(module)
        module.register_buffer(COUNTER, bias)
        assert counted(module)
    empty.register_buffer("expert_bias", None)
    assert held(empty, "expert_bias") is None
    empty.register_buffer(COUNTER, bias)
    assert not counted(empty)
    assert held(torch.nn.Linear(1, 1), "expert_bias") is None
