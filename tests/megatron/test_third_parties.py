"""Others replace the router's methods too (verl, Primus, MindSpeed, Megatron-Bridge): what holds then, in either order.

Their functions are written here as they write them: whole replacements that count by themselves, set on the class or
in the module where Megatron looks them up.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch

import megatron_fp32_router
from megatron_fp32_router import lab

# What is asked here is alike on the lines in between.
pytestmark = pytest.mark.on_lines("0.11", "0.16", "0.19")

ROUTER = "megatron.core.transformer.moe.router"
FINALIZE = "megatron.core.distributed.finalize_model_grads"
BUSY = {"seq_length": 256, "micro_batch": 4, "micro_batches": 4}  # about 1,000 tokens an expert and step
RATE = 1e-3

COUNTS = {
    "integers": lambda routing_map: routing_map.sum(dim=0),
    "floats": lambda routing_map: routing_map.float().sum(dim=0),
}


@pytest.fixture(params=["before", "after"])
def patched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`patched({"module:name": function})`: the plugin on, and theirs set before or after it."""

    def patch(functions: dict[str, Any]) -> str:
        for name in (ROUTER, FINALIZE):
            import_module(name)
        if request.param == "after":
            megatron_fp32_router.enable()
        for name, function in functions.items():
            home, _, attribute = name.partition(":")
            owner, _, method = attribute.rpartition(".")
            module = sys.modules[home]
            monkeypatch.setattr(getattr(module, owner) if owner else module, method, function)
        if request.param == "before":
            megatron_fp32_router.enable()
        return str(request.param)

    yield patch
    monkeypatch.undo()
    megatron_fp32_router.disable()


def states() -> dict[str, tuple[str, str]]:
    return {record.id: (record.state, record.detail) for record in megatron_fp32_router.status()}


def their_routing(count: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    def routing(self: Any, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        scores = torch.sigmoid(logits.view(-1, self.config.num_moe_experts))
        chosen = torch.topk(scores + self.expert_bias, k=self.topk, dim=1).indices
        routing_map = torch.zeros_like(scores).int().scatter(1, chosen, 1).bool()
        probs = scores * routing_map
        if torch.is_grad_enabled():
            with torch.no_grad():
                self.local_tokens_per_expert += count(routing_map)
        return probs / probs.sum(dim=-1, keepdim=True), routing_map

    return routing


def their_init(dtype: torch.dtype) -> Callable[..., None]:
    original = import_module(ROUTER).TopKRouter.__init__

    def patched_init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for name in ("local_tokens_per_expert", "expert_bias"):
            delattr(self, name)
        zeros = torch.zeros(self.config.num_moe_experts, dtype=dtype)
        self.register_buffer("local_tokens_per_expert", zeros, persistent=False)
        self.register_buffer("expert_bias", torch.zeros(self.config.num_moe_experts, dtype=torch.float32))

    return patched_init


def train(build: Any, steps: int = 2) -> list[tuple[np.ndarray, np.ndarray, list[np.ndarray], set[torch.dtype]]]:
    """(start bias, final bias, true counts of each step, dtypes seen) of every router of a busy training."""
    room = build(**BUSY)
    start = {name: router.expert_bias.double().numpy().copy() for name, router in room.routers()}
    maps: dict[str, list[np.ndarray]] = {name: [] for name, _ in room.routers()}
    dtypes: dict[str, set[torch.dtype]] = {name: set() for name, _ in room.routers()}

    def add(routing: Any) -> None:
        maps[routing.name].append(routing.routing_map.numpy().astype(np.int64).sum(axis=0))

    def look(_: Any) -> None:
        for name, router in room.routers():
            dtypes[name] |= {router.local_tokens_per_expert.dtype, router.expert_bias.dtype}

    room.on_counts.append(look)
    with room.record_routing(add):
        for _ in range(steps):
            room.step(lab.text_batches(room.recipe, seed=1))
    size = room.recipe.micro_batches
    return [
        (
            start[name],
            router.expert_bias.double().numpy().copy(),
            [np.sum(maps[name][first : first + size], axis=0) for first in range(0, steps * size, size)],
            dtypes[name],
        )
        for name, router in room.routers()
    ]


def assert_exact(trained: Any, rate: float = RATE) -> None:
    for start, final, steps, _ in trained:
        bias = start.astype(np.float32)
        for counts in steps:
            bias = bias + np.sign(counts.sum() - counts.size * counts).astype(np.float32) * np.float32(rate)
        assert (final == bias).all()
        assert (final != start).any()


@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS.keys())
def test_a_replaced_routing_that_counts_by_itself_is_counted_exactly(count: Any, patched: Any, build: Any) -> None:
    patched({f"{ROUTER}:TopKRouter.routing": their_routing(count)})
    trained = train(build)
    assert_exact(trained)
    assert all(dtypes == {torch.float64, torch.float32} for *_, dtypes in trained)
    assert "displaced" not in {state for state, _ in states().values()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_replaced_constructor_with_buffers_of_its_own_is_protected(
    dtype: torch.dtype, patched: Any, build: Any
) -> None:
    patched({f"{ROUTER}:TopKRouter.__init__": their_init(dtype)})
    trained = train(build)
    assert_exact(trained)
    kept = torch.int64 if dtype == torch.int64 else torch.float64
    assert all(dtypes == {kept, torch.float32} for *_, dtypes in trained)


def their_rule(tokens_per_expert: Any, expert_bias: Any, expert_bias_update_rate: Any, *args: Any, **kw: Any) -> Any:
    """Upstream's own rule at twice the rate."""
    torch.distributed.all_reduce(tokens_per_expert)
    mean = tokens_per_expert.sum(dim=-1, keepdim=True) / tokens_per_expert.shape[-1]
    return expert_bias + (torch.sign(mean - tokens_per_expert) * (2 * expert_bias_update_rate)).to(expert_bias.dtype)


def test_a_replaced_balance_rule_is_the_one_that_runs_on_exact_counts(
    patched: Any, build: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_fp32_router.log._said", set())
    order = patched({f"{FINALIZE}:get_updated_expert_bias": their_rule})
    state, detail = states()["bias-rule-in-finalize"]
    assert state == "displaced"
    assert "their_rule" in detail
    assert ("before" in detail) == (order == "before")
    assert states()["bias-rule"][0] == states()["bias-update"][0] == "applied"
    assert_exact(train(build), rate=2 * RATE)
    said = [record.getMessage() for record in caplog.records if "not in effect" in record.getMessage()]
    assert len(said) == 1
    assert "their_rule" in said[0]


def test_a_replaced_update_is_the_one_that_runs_on_exact_counts(patched: Any, build: Any) -> None:
    def update(model: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        kind = import_module(ROUTER).TopKRouter
        for router in (module for chunk in model for module in chunk.modules() if isinstance(module, kind)):
            bias = their_rule(router.local_tokens_per_expert, router.expert_bias, config.moe_router_bias_update_rate)
            router.expert_bias.copy_(bias)
            router.local_tokens_per_expert.zero_()

    patched({f"{FINALIZE}:_update_router_expert_bias": update})
    state, detail = states()["bias-update"]
    assert state == "displaced"
    assert "update" in detail
    assert_exact(train(build), rate=2 * RATE)


def test_a_replaced_gating_is_the_one_that_runs_and_gets_an_fp32_weight(
    patched: Any, build: Any, caplog: pytest.LogCaptureFixture
) -> None:
    seen: set[torch.dtype] = set()

    def gating(self: Any, input: torch.Tensor) -> torch.Tensor:
        seen.add(self.weight.dtype)
        return torch.nn.functional.linear(input.float(), self.weight)

    patched({f"{ROUTER}:Router.gating": gating})
    assert states()["gating"][0] == "displaced"
    with caplog.at_level(logging.INFO):
        assert_exact(train(build, steps=1))
    assert seen == {torch.float32}
    assert f"gating in the products of others: replaced by {__name__}.{gating.__qualname__}" in caplog.text


def test_a_wrapper_that_takes_anything_is_no_obstacle_and_one_that_leaves_ours_out_is_noticed(
    patched: Any, build: Any, release: Any
) -> None:
    name = "__init__" if release.minor < 13 else "reset_parameters"
    original = getattr(import_module(ROUTER).Router, name)

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)

    order = patched({f"{ROUTER}:Router.{name}": wrapper})
    state = states()["router-init" if release.minor < 13 else "router-reset"][0]
    if order == "before":
        assert state == "applied"
        assert all(router.weight.dtype == torch.float32 for _, router in build().routers())
    else:
        # It goes on to the function that it found before ours was there: the weight is rounded as it is initialised.
        assert state == "displaced"
        with pytest.raises(megatron_fp32_router.UnprotectedRouterError, match=r"router\.weight"):
            build()


@pytest.mark.shows("D6")
def test_without_the_plugin_their_counts_are_rounded(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{ROUTER}.TopKRouter.routing", their_routing(COUNTS["integers"]))
    with pytest.raises(AssertionError):
        assert_exact(train(build))


def test_a_router_class_with_a_gating_of_its_own_is_named_once(
    router: Any, plugin: Any, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = import_module(ROUTER).TopKRouter

    class Rounding(theirs):  # type: ignore[misc, valid-type]
        def gating(self, input: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(input, self.weight.to(input.dtype))

    class Scaling(theirs):  # type: ignore[misc, valid-type]
        def gating(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().gating(input)

    wrap = import_module("megatron.core.transformer.module").Float16Module
    x = torch.randn(16, 1, 64).bfloat16()
    for cls, dtype in ((Rounding, torch.bfloat16), (Scaling, torch.float32)):
        caplog.clear()
        built = router()
        built.__class__ = cls
        for _ in range(2):
            wrap(built.config, built)
        assert built.gating(x).dtype == dtype
        warnings = [r.getMessage() for r in caplog.records if "functions of their own" in r.getMessage()]
        name = f"{__name__}.{cls.gating.__qualname__}"
        if cls is Scaling:
            assert warnings == []
            assert name not in caplog.text + states()["gating"][1]
        else:
            assert len(warnings) == 1
            assert name in warnings[0]
            assert f"gating in the products of {name}" in caplog.text
            assert states()["gating"] == ("applied", f"not in {name}")
            megatron_fp32_router.disable()
            megatron_fp32_router.enable()


def test_a_gating_that_hangs_on_one_router_is_named_too(
    router: Any, plugin: Any, caplog: pytest.LogCaptureFixture
) -> None:
    built = router()

    def rounding(input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(input, built.weight.to(input.dtype))

    built.gating = rounding
    with caplog.at_level(logging.INFO):
        import_module("megatron.core.transformer.module").Float16Module(built.config, built)
    assert f"gating in the products of {__name__}.{rounding.__qualname__}" in caplog.text
