"""MEGATRON_FP32_ROUTER_LIKE: training chooses experts as the engine does that will serve the model."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from programs.routers import trained, wrapped
from torch.nn.functional import linear

import megatron_fp32_router
from megatron_fp32_router import lab
from megatron_fp32_router.errors import CannotMirrorError, Fp32RouterError
from megatron_fp32_router.lab import checkpoint
from megatron_fp32_router.patching.registry import registry

pytestmark = pytest.mark.on_lines("0.11", "0.19")

VARIABLE = "MEGATRON_FP32_ROUTER_LIKE"
BF16 = "sglang==0.5.23/kimi_linear"  # weight, logits and expert bias


@pytest.fixture
def like(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """`like(engine)` turns the plugin on with it."""

    def turn_on(engine: str) -> None:
        megatron_fp32_router.disable()
        monkeypatch.setenv(VARIABLE, engine)
        megatron_fp32_router.enable()

    yield turn_on
    megatron_fp32_router.disable()


def bf16(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return linear(x, w.bfloat16())


def bf16_weight(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return linear(x.float(), w.bfloat16().float())


def fp32_weight_bf16_logits(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return linear(x.to(w.dtype), w, None).to(x.dtype)


def fp32(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return linear(x.float(), w)


def qwen3(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """transformers' own router, loaded in bf16."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    config = transformers.Qwen3MoeConfig(hidden_size=w.shape[1], num_experts=w.shape[0], num_experts_per_tok=2)
    module = Qwen3MoeTopKRouter(config).bfloat16()
    seen: list[torch.Tensor] = []
    module.weight.data.copy_(w)
    with pytest.MonkeyPatch.context() as patch:
        real = torch.nn.functional.linear
        patch.setattr(torch.nn.functional, "linear", lambda *a: seen.append(real(*a)) or seen[-1])
        module(x)
    return seen[0]


ENGINES = {
    "vllm==0.33.0/deepseek_v3": bf16,
    "vllm==0.33.0/deepseek_v3?moe_router_dtype=float32": bf16_weight,
    "vllm==0.33.0/Glm4MoeForCausalLM": fp32,
    "sglang==0.5.23/deepseek_v3": bf16_weight,
    "sglang==0.5.23/deepseek_v3?router_fp32=true": fp32,
    "sglang==0.5.23/bailing_moe_v2?router_dtype=fp32": fp32_weight_bf16_logits,
    BF16: bf16,
    "transformers==5.24.0/qwen3_moe": qwen3,
}


@pytest.mark.parametrize("engine", ENGINES)
def test_logits_are_the_engine_s_bit_for_bit_and_gradients_pass_straight_through(
    engine: str, router: Any, like: Any
) -> None:
    like(engine)
    built = wrapped(router, hidden=256, expert_bias=engine != "transformers==5.24.0/qwen3_moe")
    assert built.weight.dtype == torch.float32
    x = torch.randn(96, 2, 256).bfloat16().requires_grad_()
    flat, weight = x.detach().reshape(-1, 256), built.weight.detach().clone()
    expected = ENGINES[engine](flat, weight)
    logits = built.gating(x)
    assert logits.dtype == torch.float32
    assert torch.equal(logits.view(-1, 8), expected.float())
    assert torch.equal(expected.float(), fp32(flat, weight)) == (ENGINES[engine] is fp32)

    grad = torch.randn_like(logits)
    logits.backward(grad)
    flat_grad = grad.view(-1, 8)
    served = weight if "fp32" in ENGINES[engine].__name__ else weight.bfloat16().float()
    assert torch.equal(built.weight.grad, flat_grad.t() @ flat.float())
    assert torch.equal(x.grad.view(-1, 256), (flat_grad @ served).bfloat16())
    assert torch.equal(built.weight, weight)


def test_a_linear_bias_is_rounded_with_the_weight(router: Any, like: Any, with_bias: bool) -> None:
    if not with_bias:
        return  # routers have none in this release
    like("vllm==0.33.0/gpt_oss")
    built = wrapped(router, linear_bias=True, expert_bias=False)
    with torch.no_grad():
        built.bias.copy_(torch.randn(8))
    x = torch.randn(96, 1, 64).bfloat16()
    logits = built.gating(x)
    expected = linear(x.view(-1, 64), built.weight.detach().bfloat16(), built.bias.detach().bfloat16())
    assert torch.equal(logits.view(-1, 8), expected.float())
    logits.backward(torch.ones_like(logits))
    assert torch.equal(built.bias.grad, torch.full((8,), 96.0))
    like(BF16)
    with pytest.raises(CannotMirrorError, match="have bias, and SGLang"):
        wrapped(router, linear_bias=True)


def test_experts_are_chosen_with_the_bias_that_the_engine_holds(router: Any, like: Any) -> None:
    like(BF16)
    built = wrapped(router)
    master = torch.linspace(6.9, 6.95, 8)  # bf16 has 6.90625, 6.9375 and 6.96875 there
    built.expert_bias.copy_(master)
    x = torch.randn(512, 1, 64).bfloat16()
    _, routing_map = built(x)
    scores = torch.sigmoid(bf16(x.view(-1, 64), built.weight.detach()).float())
    for bias, same in ((master.bfloat16().float(), True), (master, False)):
        chosen = torch.zeros_like(routing_map).scatter(1, (scores + bias).topk(2, dim=1).indices, True)
        assert torch.equal(routing_map, chosen) == same
    assert torch.equal(built.expert_bias, master)
    assert built.expert_bias is dict(built.named_buffers())["expert_bias"]


def test_a_compiled_gating_rounds_too(router: Any, like: Any) -> None:
    like(BF16)
    built = wrapped(router)
    x = torch.randn(32, 1, 64).bfloat16()
    compiled = torch.compile(lambda hidden: built.gating(hidden), backend="eager", fullgraph=True)
    logits = compiled(x)
    assert torch.equal(logits, built.gating(x))
    logits.sum().backward()
    assert built.weight.grad.dtype == torch.float32


def test_an_engine_that_rounds_nothing_changes_no_bit_and_one_that_rounds_does(build: Any, like: Any) -> None:
    like("")
    losses, plain = trained(build)
    like("transformers==5.24.0/deepseek_v3")
    again, under = trained(build)
    assert losses == again
    assert all(torch.equal(plain[name], under[name]) for name in plain)
    like(BF16)
    assert trained(build)[0] != losses


def test_nothing_of_it_is_imported_where_the_variable_is_unset(
    router: Any, like: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import megatron_fp32_router.gating

    names = ["megatron_fp32_router.gating.like", "megatron_fp32_router.serving.contracts"]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(megatron_fp32_router.gating, "like", raising=False)
    like("")
    wrapped(router)(torch.randn(8, 1, 64).bfloat16())
    assert not [name for name in names if name in sys.modules]


def test_a_resume_goes_on_bit_for_bit(build: Any, like: Any, tmp_path: Path) -> None:
    like(BF16)
    room = build(bias_rate=0.01)
    batches = lab.text_batches(room.recipe, seed=3)
    for _ in range(2):
        room.step(batches)
    checkpoint.save(room, tmp_path, "torch_dist")
    losses = [room.step(batches) for _ in range(2)]
    whole = checkpoint.snapshot(room)
    again = build(bias_rate=0.01)
    checkpoint.load(again, tmp_path, "torch_dist")
    batches = lab.text_batches(again.recipe, seed=3)
    for _ in range(2 * again.recipe.micro_batches):  # of the first two steps
        next(batches)
    assert [again.step(batches) for _ in range(2)] == losses
    assert checkpoint.differences(whole, checkpoint.snapshot(again)) == []


def test_the_log_and_the_monitor_say_it(
    build: Any, like: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    from megatron_fp32_router.ranks.agreement import what_must_agree

    monkeypatch.setattr("megatron_fp32_router.log._said", set())
    monkeypatch.setenv("MEGATRON_FP32_ROUTER_MONITOR", "1")
    monkeypatch.setenv("MEGATRON_FP32_ROUTER_MONITOR_DIR", str(tmp_path))
    with caplog.at_level(logging.INFO, logger="megatron_fp32_router"):
        like(BF16)
        room = build()
        room.step(lab.text_batches(room.recipe, seed=3))
    assert f", rounded like {BF16}" in caplog.text
    (loud,) = {record.getMessage() for record in caplog.records if "NOT FP32" in record.getMessage()}
    assert "weight the model's dtype (kimi_linear.py:105)" in loud
    assert "Not mirrored: expert_bias logits with ROCm with aiter" in loud
    records = [json.loads(line) for line in (tmp_path / "monitor.jsonl").read_text().splitlines()]
    assert [record.get("like") for record in records if record["layer"] == "all"] == [BF16]
    # 8 significant bits are what was asked for.
    assert all(record["violations"] == [] for record in records)
    assert what_must_agree()[VARIABLE] == BF16
    assert what_must_agree() | {VARIABLE: "unset"} != what_must_agree()


def test_a_model_that_the_engine_cannot_have_is_refused(router: Any, like: Any, release: Any) -> None:
    like("vllm==0.33.0/qwen3_moe")
    with pytest.raises(CannotMirrorError, match=r"have expert_bias, and vLLM 0\.33\.0 has none"):
        wrapped(router)
    like(BF16)
    with pytest.raises(CannotMirrorError, match="expected TopKRouters of a model in bf16 or fp16"):
        router(precision="fp32").gating(torch.randn(4, 1, 64))
    if release.minor > 11:
        with pytest.raises(CannotMirrorError, match="no engine computes in fp64"):
            wrapped(router, router_dtype="fp64")


def test_turning_it_on_again_reads_the_variable_again(
    router: Any, plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = wrapped(router)
    x = torch.randn(96, 1, 64).bfloat16()
    exact = built.gating(x)
    monkeypatch.setenv(VARIABLE, BF16)
    plugin()
    assert torch.equal(built.gating(x).view(-1, 8), bf16(x.view(-1, 64), built.weight.detach()).float())
    monkeypatch.delenv(VARIABLE)
    plugin()
    assert torch.equal(built.gating(x), exact)


def test_somebody_else_s_gating_is_refused(router: Any, like: Any) -> None:
    like(BF16)
    built = router()
    built.gating = lambda input: input
    wrap = import_module("megatron.core.transformer.module").Float16Module
    with pytest.raises(CannotMirrorError, match="would not be in effect"):
        wrap(built.config, built)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("vllm==0.32.0/deepseek_v3", r"no contract for vllm==0\.32\.0.*known are .*vllm==0\.33\.0"),
        ("vllm==0.33.0/deepseek_v9", r"no contract for deepseek_v9 in vLLM.*known are DeepseekV3ForCausalLM"),
        ("sglang==0.5.23/gpt_oss", r"what SGLang 0\.5\.23 makes of the logits of gpt-oss is not known"),
        ("sglang==0.5.23/deepseek_v3?router_fp23=true", r"does not look at router_fp23.*known are .*router_fp32"),
        ("vllm/deepseek_v3", r"accepted is ENGINE==VERSION/ARCHITECTURE"),
    ],
)
def test_an_unknown_engine_is_refused_before_a_model_is_built(asked: str, told: str, router: Any, like: Any) -> None:
    router()  # Megatron's router is imported
    with pytest.raises(Fp32RouterError, match=told):
        like(asked)
    registry.settings = megatron_fp32_router.Settings()
