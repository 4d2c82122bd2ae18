"""Routers that are no TopKRouter (Primus V4's and Pai's are plain Modules): named, and protected if asked for."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

import pytest
import torch

import megatron_fp32_router
from megatron_fp32_router.lab import compat
from megatron_fp32_router.lab.model import default_groups

# What is asked here is alike on the lines in between.
pytestmark = pytest.mark.on_lines("0.11", "0.19")

EXPERTS = 8


class PlainRouter(torch.nn.Module):
    """A router as Primus writes it: on torch's Module, with Megatron's names."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(EXPERTS, 64))
        self.register_buffer("expert_bias", torch.rand(EXPERTS))
        self.register_buffer("local_tokens_per_expert", torch.zeros(EXPERTS), persistent=False)


def wrapped(router: Any, made: Any) -> Any:
    """A model of Megatron's configuration that holds `made`, wrapped for bf16."""
    model = torch.nn.Sequential(made, torch.nn.Linear(2, 2))
    return import_module("megatron.core.transformer.module").Float16Module(router().config, model)


def on_router_base(router: Any) -> Any:
    """A router on Megatron's abstract class, and not on TopKRouter."""
    base = import_module("megatron.core.transformer.moe.router").Router

    class BaseRouter(base):  # type: ignore[misc, valid-type]
        def routing(self, logits: torch.Tensor) -> Any:
            return logits

        def forward(self, input: torch.Tensor) -> Any:
            return self.routing(self.gating(input))

    def make() -> Any:
        config = router().config
        names = compat.signature_kwargs(base.__init__, pg_collection=0, model_comm_pgs=0)
        return BaseRouter(config, **dict.fromkeys(names, default_groups()))

    return BaseRouter, make


@pytest.mark.parametrize("kind", ["plain", "base"])
def test_a_class_of_its_own_is_named_and_one_call_protects_it(
    kind: str, router: Any, plugin: Any, caplog: pytest.LogCaptureFixture
) -> None:
    cls, make = on_router_base(router) if kind == "base" else (PlainRouter, PlainRouter)
    with pytest.raises(megatron_fp32_router.UnprotectedRouterError, match=rf"{__name__}\.\S*{cls.__name__}.*protect_r"):
        wrapped(router, make())

    megatron_fp32_router.protect_router_class(cls)
    made = make()
    before = made.weight.detach().clone()
    with caplog.at_level(logging.INFO):
        model = wrapped(router, made)
    assert made.weight.dtype == before.dtype == torch.float32
    assert torch.equal(made.weight, before)
    assert model.module[1].weight.dtype == torch.bfloat16
    assert "1 router: weight float32 x1" in caplog.text
    assert f"the products of {__name__}.{cls.__qualname__}" in caplog.text

    megatron_fp32_router.disable()
    assert "_apply" not in vars(cls)
    assert made.bfloat16().weight.dtype == torch.bfloat16


def test_its_counters_are_exact_and_its_bias_moves_by_integers(router: Any, plugin: Any) -> None:
    megatron_fp32_router.protect_router_class(PlainRouter)
    megatron_fp32_router.protect_router_class(PlainRouter)  # once is enough
    made = PlainRouter()
    start = made.expert_bias.clone()
    model = wrapped(router, made)
    assert made.local_tokens_per_expert.dtype == torch.float64
    counts = torch.tensor([1025, 1024, 1023, 1024, 1026, 1022, 1025, 1023])
    made.local_tokens_per_expert += counts
    config = model.config
    config.moe_router_bias_update_rate = 1e-3
    import_module("megatron.core.distributed.finalize_model_grads")._update_router_expert_bias([model], config)
    step = torch.sign(counts.sum() - EXPERTS * counts).float()
    assert torch.equal(made.expert_bias, torch.add(start, step, alpha=1e-3))


def test_a_class_with_an_apply_of_its_own_gets_that_very_function_back(plugin: Any) -> None:
    class WithOwn(PlainRouter):
        def _apply(self, *args: Any, **kwargs: Any) -> Any:
            return super()._apply(*args, **kwargs)

    own = vars(WithOwn)["_apply"]
    megatron_fp32_router.protect_router_class(WithOwn)
    assert WithOwn().bfloat16().weight.dtype == torch.float32
    megatron_fp32_router.disable()
    assert vars(WithOwn)["_apply"] is own


def test_it_takes_classes_of_modules_only_and_leaves_a_topk_router_alone(plugin: Any) -> None:
    with pytest.raises(TypeError, match=r"subclass of torch\.nn\.Module; found 3"):
        megatron_fp32_router.protect_router_class(3)  # type: ignore[arg-type]
    topk = import_module("megatron.core.transformer.moe.router").TopKRouter
    ours = topk._apply
    megatron_fp32_router.protect_router_class(topk)
    assert topk._apply is ours


def test_it_says_so_when_the_plugin_is_off(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_fp32_router.log._said", set())
    megatron_fp32_router.protect_router_class(PlainRouter)
    assert "PlainRouter is not protected" in caplog.text
    assert "_apply" not in vars(PlainRouter)
