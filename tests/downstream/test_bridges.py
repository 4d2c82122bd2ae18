"""Megatron-Bridge and mbridge: Hugging Face checkpoints in and out, and the routers that are trained between."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

BRIDGES = {
    # What the index has, and the release that it installs with.
    "run_megatron_bridge": ("0.19.2", "cpu_program", ("qwen3-moe", "glm-4.5", "deepseek-v3")),
    # It asks for ModelType.encoder_and_decoder, which 0.18 no longer has.
    "run_mbridge": ("0.16.1", "cpu", ("qwen3-moe", "glm-4.5")),
}
FAMILIES = [(program, family) for program, (_, _, families) in BRIDGES.items() for family in families]


@pytest.fixture
def bridge(run: Callable[..., Any]) -> Callable[..., Any]:
    """`bridge(program, plugin)`: the run of one of them."""

    def start(program: str, plugin: bool) -> Any:
        megatron, pretence, _ = BRIDGES[program]
        return run(program, megatron, plugin, PRETENCE=pretence)

    return start


@pytest.mark.parametrize(("program", "family"), FAMILIES)
def test_routers_are_fp32_and_come_out_as_they_went_in(program: str, family: str, bridge: Any) -> None:
    on = bridge(program, True)
    seen = on.seen["models"][family]
    assert seen["dtypes"]["weight"] == ["float32"]
    assert all(seen["exported"].values()), seen["exported"]
    assert all(seen["saved"].values()), seen["saved"]
    assert seen["gradients"] == ["torch.float32"]
    assert on.displaced() == set()
    assert {on.state(name) for name in ("router-casts", "gating", "bias-update", "wrap-check")} == {"applied"}
    routers = len([key for key in seen["saved"] if key.endswith("weight")])
    assert on.said(f"{routers} router{'s' if routers > 1 else ''}: weight float32 x{routers}")


@pytest.mark.parametrize(("program", "family"), FAMILIES)
def test_biases_are_what_integers_make_of_the_tokens(program: str, family: str, bridge: Any) -> None:
    seen = bridge(program, True).seen["models"][family]
    assert seen["bias"] == seen["exact"]
    if family == "qwen3-moe":
        assert seen["bias"] == {}  # it is balanced by a loss
    else:
        assert seen["dtypes"]["expert_bias"] == ["float32"]
        assert seen["dtypes"]["local_tokens_per_expert"] == ["float64"]
        assert seen["bias"] != seen["started"]


@pytest.mark.parametrize(("program", "family"), FAMILIES)
def test_without_the_plugin_the_same_run_rounds(program: str, family: str, bridge: Any) -> None:
    off = bridge(program, False)
    seen = off.seen["models"][family]
    assert off.seen["status"] == {}
    assert seen["dtypes"]["weight"] == ["bfloat16"]
    weights = [same for key, same in seen["saved"].items() if key.endswith("weight")]
    assert weights
    assert not any(weights)
    if family != "qwen3-moe":
        assert seen["dtypes"]["local_tokens_per_expert"] == ["bfloat16"]
        assert seen["bias"] != seen["exact"]


def test_mbridge_rounds_weights_by_itself_when_it_reads_them(bridge: Any) -> None:
    # Bridge._weight_to_mcore_format: everything but expert_bias goes through the dtype of the bridge.
    for family in BRIDGES["run_mbridge"][2]:
        assert bridge("run_mbridge", True).seen["models"][family]["imported"]


def test_bridge_trains_an_adapter_on_fp32_logits_and_exact_counts(bridge: Any) -> None:
    on, off = (bridge("run_megatron_bridge", plugin).seen["lora"] for plugin in (True, False))
    assert on["routers"] == off["routers"] == 1
    assert on["dtypes"]["weight"] == on["dtypes"]["expert_bias"] == ["float32"]
    assert on["bias"] == on["exact"] != on["started"]
    assert off["dtypes"]["weight"] == ["bfloat16"]
    assert off["bias"] != off["exact"]


#: What an engine makes of an fp32 weight; for transformers an experiment says the same (tests/test_serving_run.py).
SERVED = {
    "qwen3-moe": {"transformers": "bfloat16", "vllm": "bfloat16", "sglang": "bfloat16"},
    "glm-4.5": {"transformers": "float32", "vllm": "float32", "sglang": "float32"},
    "deepseek-v3": {"transformers": "float32", "vllm": "bfloat16", "sglang": "bfloat16"},
}


@pytest.mark.parametrize("family", SERVED)
def test_the_audit_says_what_three_engines_will_make_of_the_export(family: str, bridge: Any) -> None:
    def audited(plugin: bool) -> list[dict[str, Any]]:
        folder = bridge("run_megatron_bridge", plugin).seen["models"][family]["folder"]
        engines = "transformers==5.24.0,vllm==0.33.0,sglang==0.5.23"
        command = [sys.executable, "-m", "megatron_fp32_router", "audit", folder, "--json", "--for", engines]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        tensors: list[dict[str, Any]] = json.loads(done.stdout)["tensors"]
        return [tensor for tensor in tensors if tensor["kind"] == "weight"]

    on, off = audited(True), audited(False)
    assert on
    assert {tensor["dtype"] for tensor in on} == {"float32"}
    assert {tensor["dtype"] for tensor in off} == {"bfloat16"}
    for tensor in on:
        served = {f["data"]["engine"]: f for f in tensor["findings"] if f["check"] == "serving"}
        assert {engine: finding["data"]["to"] for engine, finding in served.items()} == SERVED[family]
        for finding in served.values():
            assert finding["verdict"] == ("good" if finding["data"]["to"] == "float32" else "problem")


@pytest.mark.parametrize("family", SERVED)
def test_biases_are_shifted_on_their_way_to_an_engine_and_nothing_else_is(family: str, bridge: Any) -> None:
    seen = bridge("run_megatron_bridge", True).seen["models"][family]
    found = seen["shifted"]
    assert sorted(found["moved"]) == sorted(key for key in seen["saved"] if key.endswith("e_score_correction_bias"))
    assert all(found["one constant each"])
    assert all(0 <= lowest < 1e-6 for lowest in found["lowest"])
