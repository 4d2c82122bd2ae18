"""The emulation of engines against transformers' own modules, and what `parity` says of recorded inputs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from megatron_fp32_router import cli
from megatron_fp32_router.errors import SettingsError
from megatron_fp32_router.monitor.recording import Inputs, RecordingError, read
from megatron_fp32_router.serving import engine
from megatron_fp32_router.serving.contracts import NoContractError, engines, find
from megatron_fp32_router.serving.parity import ParityError, served
from megatron_fp32_router.settings import from_environment

TRANSFORMERS = engines()["transformers"]
TOKENS, EXPERTS, TOPK, HIDDEN = 4096, 64, 6, 128

SIZES = {"hidden_size": HIDDEN, "num_experts_per_tok": TOPK, "norm_topk_prob": True, "routed_scaling_factor": 1.0}
#: (transformers' router, its sizes); expert biases around 7, where bf16 is coarse.
ROUTERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "DeepseekV3ForCausalLM": (DeepseekV3TopkRouter, {"n_routed_experts": EXPERTS, "n_group": 8, "topk_group": 4}),
    "Glm4MoeForCausalLM": (Glm4MoeTopkRouter, {"n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1}),
    "Qwen3MoeForCausalLM": (Qwen3MoeTopKRouter, {"num_experts": EXPERTS}),
    "MiniMaxM2ForCausalLM": (MiniMaxM2TopKRouter, {"num_local_experts": EXPERTS}),
    "GptOssForCausalLM": (GptOssTopKRouter, {"num_local_experts": EXPERTS}),
}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16().float(),
        "weight": 0.1 * torch.randn(EXPERTS, HIDDEN, generator=generator),
        "bias": torch.randn(EXPERTS, generator=generator),
        "expert_bias": 7 + 0.05 * torch.randn(EXPERTS, generator=generator),
    }


@pytest.mark.parametrize("architecture", ROUTERS)
def test_the_emulation_of_transformers_is_transformers_bit_for_bit(architecture: str) -> None:
    kind, sizes = ROUTERS[architecture]
    configuration = getattr(transformers, architecture).config_class(**SIZES, **sizes)
    contract, given = TRANSFORMERS.model(architecture), tensors()
    # As tests/test_serving_run.py establishes that loading leaves them.
    theirs = kind(configuration)
    for name, parameter in theirs.named_parameters():
        dtype = contract.resolved(contract.tensors[name][0], {"dtype": "bfloat16"})
        parameter.data = given[name].to(getattr(torch, str(dtype)))
    more = ()
    if architecture == "MiniMaxM2ForCausalLM":
        more = (given["expert_bias"].bfloat16(),)
    elif "expert_bias" in contract.tensors:
        theirs.e_score_correction_bias.copy_(given["expert_bias"])
    with torch.no_grad():
        logits_TE, weights_TK, chosen_TK = theirs(given["hidden"].bfloat16(), *more)

    config = {"architectures": [architecture], "dtype": "bfloat16", **SIZES, **sizes}
    groups = (sizes["n_group"], sizes["topk_group"]) if sizes.get("n_group", 1) > 1 else (None, None)
    how = engine.arithmetic_of(TRANSFORMERS, config, TOPK, *groups)
    routed = engine.route(given["hidden"], given["weight"], given["expert_bias"], how, given["bias"])
    assert routed.logits_TE.dtype == logits_TE.dtype
    assert torch.equal(routed.logits_TE, logits_TE)
    assert torch.equal(routed.chosen_TE, torch.zeros_like(routed.chosen_TE).scatter_(1, chosen_TK, True))
    ours_TK = engine.weights(routed.scores_TE, routed.chosen_TE, how.function).gather(1, chosen_TK)
    # Summed in another order; Qwen3 and gpt-oss then round to the logits' dtype.
    tolerance = 2**-8 if weights_TK.dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(ours_TK, weights_TK.float(), rtol=tolerance, atol=0)


def inputs(**fields: Any) -> Inputs:
    given = {name: tensor for name, tensor in tensors().items() if name != "bias"}
    return replace(Inputs(given, TOPK, "sigmoid", False, None, None, False), **fields)


DEEPSEEK = {"architectures": ["DeepseekV3ForCausalLM"], "dtype": "bfloat16", "topk_method": "noaux_tc"}


def test_each_rounding_is_found_alone_and_a_switch_in_the_configuration_is_followed() -> None:
    found = served(inputs(), find("vllm==0.33.0"), DEEPSEEK)
    assert found["arithmetic"] == {
        "hidden": "bfloat16", "weight": "bfloat16", "expert_bias": "float32", "logits": "bfloat16"
    }  # fmt: skip
    assert set(found["alone"]) == {"hidden", "weight", "logits", "choice"}
    nothing = {"tokens": 0, "experts": 0, "weight": pytest.approx(0, abs=1e-6), "weight_same_experts": pytest.approx(0, abs=1e-6)}  # fmt: skip # noqa: E501
    assert found["alone"]["hidden"] == nothing  # bf16 values
    assert found["alone"]["choice"] == nothing
    for part in ("weight", "logits"):
        assert 0 < found["alone"][part]["tokens"] <= found["alone"][part]["experts"]
        assert found["alone"][part]["weight_same_experts"] < found["alone"][part]["weight"]
    assert found["together"]["tokens"] > found["alone"]["weight"]["tokens"]

    found = served(inputs(), find("vllm==0.33.0"), {**DEEPSEEK, "moe_router_dtype": "float32"})
    assert set(found["alone"]) == {"hidden", "weight", "choice"}
    assert found["together"] == found["alone"]["weight"]

    found = served(inputs(), find("transformers==5.24.0"), DEEPSEEK)
    assert found["together"]["tokens"] == 0


def test_roundings_of_the_emulation_are_those_of_the_monitor() -> None:
    from megatron_fp32_router.serving.parity import monitored

    recorded, flips = inputs(), monitored(inputs())
    alone = served(recorded, find("vllm==0.33.0"), DEEPSEEK)["alone"]
    kimi = {"architectures": ["KimiLinearForCausalLM"], "dtype": "bfloat16"}
    alone["expert_bias"] = served(recorded, find("sglang==0.5.23"), kimi)["alone"]["expert_bias"]
    for part, name in {"weight": "bf16_weight", "logits": "bf16_logits", "expert_bias": "bf16_bias"}.items():
        assert alone[part]["tokens"] / TOKENS == flips[name] > 0


def test_an_input_that_is_not_in_the_dtype_of_the_model_is_rounded_to_it() -> None:
    given = tensors() | {"hidden": torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))}
    del given["bias"]
    found = served(inputs(tensors=given), find("transformers==5.24.0"), DEEPSEEK)
    assert found["alone"]["hidden"]["tokens"] > 0


def test_an_expert_bias_that_an_engine_does_not_use_is_left_out() -> None:
    without = {key: value for key, value in DEEPSEEK.items() if key != "topk_method"}
    found = served(inputs(), find("vllm==0.33.0"), without)
    assert found["arithmetic"]["expert_bias"] == "not used"
    assert found["alone"]["expert_bias"]["tokens"] > TOKENS / 2


def test_groups_count_with_their_best_two_experts_and_others_are_left_out() -> None:
    given = tensors()
    how = engine.Arithmetic(TOPK, "sigmoid", groups=8, group_topk=2)
    chosen = engine.route(given["hidden"], given["weight"], given["expert_bias"], how).chosen_TE.numpy()
    logits = given["hidden"].double().numpy() @ given["weight"].double().numpy().T
    selection = 1 / (1 + np.exp(-logits)) + given["expert_bias"].double().numpy()
    for row, token in zip(chosen[:200], selection[:200], strict=True):
        best = np.argsort(-np.sort(token.reshape(8, 8), axis=1)[:, -2:].sum(axis=1))[:2]
        allowed = np.repeat(np.isin(np.arange(8), best), 8)
        assert set(np.flatnonzero(row)) == set(np.argsort(-np.where(allowed, token, -np.inf))[:TOPK])


@pytest.mark.parametrize(
    ("fields", "config", "message"),
    [
        ({}, {"num_experts_per_tok": 8}, "experts of each token: config.json says 8, and the recorded router has 6"),
        ({}, {"n_routed_experts": 256}, "experts: config.json says 256, and the recorded router has 64"),
        ({}, {"n_group": 8}, "groups: config.json says 8, and the recorded router has 1"),
        ({"score_function": "softmax"}, {}, "trained with the score function softmax"),
        ({"quantile": True}, {}, "trained with quantile balancing"),
    ],
)
def test_routers_of_another_model_are_refused(fields: dict[str, Any], config: dict[str, Any], message: str) -> None:
    with pytest.raises(ParityError, match=message):
        served(inputs(**fields), find("vllm==0.33.0"), DEEPSEEK | config)


def test_what_no_contract_says_is_not_made_up() -> None:
    with pytest.raises(
        NoContractError, match=r"dtype of the logits of GptOssForCausalLM in SGLang .* no contract says"
    ):
        served(inputs(score_function="softmax"), find("sglang==0.5.23"), {"architectures": ["GptOssForCausalLM"], "dtype": "bfloat16"})  # fmt: skip # noqa: E501
    with pytest.raises(NoContractError, match=r'config\.json has to name it: "dtype", found None'):
        served(inputs(), find("vllm==0.33.0"), {**DEEPSEEK, "dtype": None})


# The file and the command ----------------------------------------------------------------------------------------


def write(file: Path, **changes: Any) -> Path:
    """A recording of one layer, by hand."""
    layer = {"layer": 3, "topk": TOPK, "score_function": "sigmoid", "pre_softmax": False, "groups": None, "group_topk": None, "quantile": False}  # fmt: skip # noqa: E501
    arrays = {f"0/{name}": tensor.numpy() for name, tensor in tensors().items() if name != "bias"}
    root = {"version": 1, "step": 100, "layers": [layer]}
    np.savez(file, **{"recording": np.array(json.dumps(root)), **arrays, **changes})
    return file


def test_the_command_prints_what_it_found_and_its_exit_code_says_whether(tmp_path: Path, capsys: Any) -> None:
    file = write(tmp_path / "inputs.npz")
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK))
    asked = ["parity", str(file), "--config", str(tmp_path)]
    assert cli.main([*asked, "--for", "transformers==5.24.0"]) == 0
    assert cli.main([*asked, "--for", "transformers==5.24.0,vllm==0.33.0", "--json"]) == 1
    shown, _, printed = capsys.readouterr().out.partition("{")
    assert "step 100: 4,096 tokens of 1 layers" in shown
    assert "transformers 5.24.0, DeepseekV3ForCausalLM: hidden bfloat16, weight float32" in shown
    said = json.loads("{" + printed)
    (layer,) = said["layers"]
    assert (layer["layer"], layer["tokens"], layer["experts"], layer["topk"]) == (3, TOKENS, EXPERTS, TOPK)
    assert layer["engines"].keys() == {"transformers==5.24.0", "vllm==0.33.0"}
    assert cli.main([*asked, "--for", "vllm==0.33.0"]) == 1
    shown = capsys.readouterr().out
    assert 'logits: deepseek_v2.py:135; "moe_router_dtype": "float32" in config.json' in shown
    assert "weight: deepseek_v2.py:321; no switch is known" in shown


def test_bad_input_is_refused_with_what_was_expected(tmp_path: Path, capsys: Any) -> None:
    def refused(*asked: str) -> str:
        assert cli.main(["parity", *asked]) == 2
        said: str = capsys.readouterr().err
        return said

    assert "expected inputs-*.npz, which MEGATRON_FP32_ROUTER_MONITOR_RECORD=N writes" in refused(str(tmp_path))
    assert "cannot be read" in refused(str(tmp_path / "none.npz"))
    file = write(tmp_path / "inputs.npz")
    assert "--for needs --config FILE" in refused(str(file), "--for", "vllm==0.33.0")
    assert "no contract for vllm==0.1" in refused(str(file), "--for", "vllm==0.1", "--config", "x")
    assert "expected the config.json" in refused(str(file), "--for", "vllm==0.33.0", "--config", str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"0/weight": np.zeros((EXPERTS, HIDDEN))}, r"weight of layer 0: expected finite float32 \[64, 128\], found"),
        ({"0/weight": np.zeros((EXPERTS, 3), np.float32)}, r"hidden of layer 0: expected finite float32 \[4096, 3\]"),
        ({"0/hidden": np.full((4, HIDDEN), np.nan, np.float32)}, "hidden of layer 0: expected finite"),
        ({"recording": np.array({"an": "object"}, dtype=object)}, "allow_pickle=False"),
        ({"recording": np.array('{"version": 2}')}, "version 2, expected 1"),
    ],
)
def test_a_file_that_is_not_a_recording_is_refused_and_nothing_in_it_is_unpickled(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecordingError, match=message):
        read(write(tmp_path / "inputs.npz", **changes))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "inputs.npz")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RecordingError, match="expected a file that MEGATRON_FP32_ROUTER_MONITOR_RECORD wrote"):
        read(file)


# The variable ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "expected"), [("", 0), ("0", 0), ("1", 1), (" 512 ", 512)])
def test_the_number_of_recorded_tokens_is_read(value: str, expected: int) -> None:
    variables = {"MEGATRON_FP32_ROUTER_MONITOR": "10", "MEGATRON_FP32_ROUTER_MONITOR_RECORD": value}
    assert from_environment(variables).monitor_record == expected


def test_more_tokens_than_a_look_has_and_recording_without_looks_are_refused() -> None:
    for value in ("513", "-1", "all"):
        with pytest.raises(SettingsError, match="accepted is a whole number of tokens, 0 to 512"):
            from_environment({"MEGATRON_FP32_ROUTER_MONITOR_RECORD": value})
    with pytest.raises(SettingsError, match="MEGATRON_FP32_ROUTER_MONITOR is off: inputs are recorded only when"):
        from_environment({"MEGATRON_FP32_ROUTER_MONITOR_RECORD": "8"})
