"""`audit EXPORT --for ENGINE==VERSION`: is it what was trained, and what will the engine make of it?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

from megatron_fp32_router.audit import open_checkpoint
from megatron_fp32_router.cli import main
from megatron_fp32_router.serving import export
from megatron_fp32_router.serving.contracts import find

ROOT = Path(__file__).resolve().parent.parent
DEEPSEEK = {"architectures": ["DeepseekV3ForCausalLM"], "topk_method": "noaux_tc", "torch_dtype": "bfloat16"}


def router(layer: int, seed: int = 0) -> dict[str, np.ndarray]:
    """One router in DeepSeek-V3's names: fp32 values that bf16 does not hold."""
    random = np.random.default_rng(seed)
    bias = np.full(8, 30, np.float32)
    for step in random.choice([-1, 1], (400, 8)):
        bias += step.astype(np.float32) * np.float32(1e-3)
    return {
        f"model.layers.{layer}.mlp.gate.weight": random.normal(0, 0.02, (8, 16)).astype(np.float32),
        f"model.layers.{layer}.mlp.gate.e_score_correction_bias": bias,
        f"model.layers.{layer}.mlp.experts.0.up_proj.weight": np.ones((2, 2), bfloat16),
    }


def write(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    """An export: safetensors and a config.json."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(DEEPSEEK | config), encoding="utf-8")
    return folder


def asked(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[dict[str, Any]]]:
    """The exit code, and every answer about serving with the tensor it is about."""
    code = main(["audit", "--json", *map(str, arguments)])
    said = json.loads(capsys.readouterr().out)
    found = [f | {"tensor": t["name"]} for t in said["tensors"] for f in t["findings"]] + said["other_findings"]
    return code, [finding for finding in found if finding["check"] == "serving"]


def test_an_engine_that_rounds_the_weight_is_named_with_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "export", router(3) | router(4, 1))
    code, found = asked(capsys, folder, "--for", "vllm==0.33.0")
    assert code == 1
    weight = next(f for f in found if f["tensor"] == "model.layers.3.mlp.gate.weight")
    assert weight["text"].startswith("float32 → bfloat16 by vLLM 0.33.0 (deepseek_v2.py:321): 128 of 128 values change")
    assert (weight["verdict"], weight["data"]["changed"]) == ("problem", 128)
    bias = next(f for f in found if f["tensor"].endswith("4.mlp.gate.e_score_correction_bias"))
    assert bias["verdict"] == "good"
    assert bias["text"].startswith("stays float32 in vLLM 0.33.0 (deepseek_v2.py:327); bfloat16 (ROCm")
    assert any("logits of DeepseekV3ForCausalLM in bfloat16" in f["text"] for f in found)


def test_several_engines_at_once_by_comma_or_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "export", router(3))
    both = [folder, "--for", "transformers==5.24.0,sglang==0.5.23", "--for", "vllm==0.33.0"]
    code, found = asked(capsys, *both)
    by = {f["data"]["engine"]: f for f in found if f["tensor"].endswith("3.mlp.gate.weight")}
    assert {name: f["verdict"] for name, f in by.items()} == {
        "transformers": "good",
        "sglang": "problem",
        "vllm": "problem",
    }
    assert '"router_fp32": true' in by["sglang"]["text"]
    assert code == 1
    assert asked(capsys, folder, "--for", "transformers==5.24.0")[0] == 0


def test_the_switch_in_config_json_is_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "export", router(3), router_fp32=True, moe_router_dtype="float32")
    code, found = asked(capsys, folder, "--for", "sglang==0.5.23")
    assert (code, [f["verdict"] for f in found if f["tensor"].endswith("gate.weight")]) == (0, ["good"])
    code, found = asked(capsys, folder, "--for", "vllm==0.33.0")
    assert any("logits of DeepseekV3ForCausalLM in float32" in f["text"] for f in found)
    # The weight stays in the model's dtype there.
    assert code == 1
    (bias,) = (f for f in found if f["tensor"].endswith("bias"))
    assert "ROCm" not in bias["text"]


def test_a_weight_that_bf16_holds_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = router(3)
    name = "model.layers.3.mlp.gate.weight"
    tensors[name] = tensors[name].astype(bfloat16).astype(np.float32)
    _, found = asked(capsys, write(tmp_path / "export", tensors), "--for", "vllm==0.33.0")
    (weight,) = (f for f in found if f["tensor"] == name)
    assert (weight["verdict"], "no value changes" in weight["text"]) == ("good", True)


def test_a_bias_that_kimi_linear_in_sglang_rounds_is_a_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {name.replace(".mlp.", ".block_sparse_moe."): values for name, values in router(3).items()}
    folder = write(tmp_path / "export", tensors, architectures=["KimiLinearForCausalLM"])
    code, found = asked(capsys, folder, "--for", "sglang==0.5.23")
    (bias,) = (f for f in found if f["tensor"].endswith("bias"))
    assert code == 1
    assert (
        "float32 → bfloat16 by SGLang 0.5.23 (kimi_linear.py:113): 6 of 8 values change, 7 different ones become 1"
        in bias["text"]
    )


def test_a_missing_bias_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = router(3) | router(4)
    del tensors["model.layers.4.mlp.gate.e_score_correction_bias"]
    code, found = asked(capsys, write(tmp_path / "export", tensors), "--for", "transformers==5.24.0")
    assert code == 1
    (missing,) = (f for f in found if f["verdict"] == "problem")
    assert missing["tensor"] == "model.layers.4.mlp.gate.expert_bias"
    assert "missing: transformers reads one for DeepseekV3ForCausalLM" in missing["text"]
    assert "#4199, #4657" in missing["text"]


def test_a_layer_with_experts_and_no_router_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = router(3) | router(4)
    del tensors["model.layers.4.mlp.gate.e_score_correction_bias"], tensors["model.layers.4.mlp.gate.weight"]
    code, found = asked(capsys, write(tmp_path / "export", tensors), "--for", "transformers==5.24.0")
    assert code == 1
    (missing,) = (f for f in found if f["verdict"] == "problem")
    assert (missing["tensor"], missing["data"]["layer"]) == ("decoder.layers.4.router.weight", 4)
    assert "this layer has experts" in missing["text"]


def test_a_bias_of_zeros_is_named_unless_training_has_it_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = router(3)
    name = "model.layers.3.mlp.gate.e_score_correction_bias"
    save_file(tensors, tmp_path / "trained.safetensors")
    folder = write(tmp_path / "export", tensors | {name: np.zeros(8, np.float32)})
    code, found = asked(capsys, folder, "--for", "transformers==5.24.0")
    zero = [f for f in found if f["tensor"] == name and "every bias is zero" in f["text"]]
    assert (code, [f["verdict"] for f in zero]) == (1, ["problem"])
    _, found = asked(capsys, folder, "--for", "transformers==5.24.0", "--against", tmp_path / "trained.safetensors")
    assert any("not what was trained: 8 of 8 values differ" in f["text"] for f in found)
    save_file(tensors | {name: np.zeros(8, np.float32)}, tmp_path / "trained.safetensors")
    _, found = asked(capsys, folder, "--for", "transformers==5.24.0", "--against", tmp_path / "trained.safetensors")
    zero = [f for f in found if f["tensor"] == name and "every bias is zero" in f["text"]]
    assert [f["verdict"] for f in zero] == ["good"]


def test_an_export_is_compared_with_training_bit_for_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = ROOT / "tests" / "corpus" / "audit" / "0.19.2-on-torch_dist"
    kinds = {"weight": "gate.weight", "expert_bias": "gate.e_score_correction_bias"}
    tensors = {
        f"model.layers.{tensor.key[1]}.mlp.{kinds[tensor.kind]}": tensor.values
        for tensor in open_checkpoint(trained).tensors
        if tensor.kind in kinds and tensor.values is not None
    }
    options = ["--for", "transformers==5.24.0", "--against", trained]
    code, found = asked(capsys, write(tmp_path / "export", tensors), *options)
    same = [f for f in found if f["text"] == "the same as in training, bit for bit"]
    assert (code, len(same)) == (0, len(tensors))
    name = "model.layers.0.mlp.gate.weight"
    for change in (tensors[name].astype(bfloat16), np.nextafter(tensors[name], np.float32(9))):
        code, found = asked(capsys, write(tmp_path / "export", tensors | {name: change}), *options)
        (said,) = (f["text"] for f in found if f["tensor"] == name and "trained" in f["text"])
        assert code == 1
        assert ("rounded from float32 to bfloat16 on the way" in said) == (change.dtype == bfloat16)
    del tensors[name]
    _, found = asked(capsys, write(tmp_path / "export", tensors), *options)
    assert any(f["text"].startswith("missing: it is in the training's checkpoint") for f in found)


@pytest.mark.parametrize(
    ("engine", "config", "says"),
    [
        ("vllm==0.1.0", {}, "no contract for vllm==0.1.0"),
        ("vllm", {}, "no contract for vllm:"),
        ("triton==1", {}, "known are sglang==0.5.23"),
        ("vllm==0.33.0", {"architectures": ["OtherForCausalLM"]}, "no contract for OtherForCausalLM in vLLM 0.33.0"),
        ("vllm==0.33.0", {"architectures": None}, 'expected "architectures" with one name, found None'),
    ],
)
def test_what_is_not_known_is_said_plainly(
    engine: str, config: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "export", router(3), **config)
    assert main(["audit", str(folder), "--for", engine]) == 2
    assert says in capsys.readouterr().err


def test_without_a_config_json_it_could_not_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(router(3), tmp_path / "model.safetensors")
    assert main(["audit", str(tmp_path), "--for", "vllm==0.33.0"]) == 2
    assert "config.json: expected the config.json of an export" in capsys.readouterr().err


def test_the_page_and_the_table_have_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "export", router(3) | router(4, 1))
    main(["audit", str(folder), "--for", "vllm==0.33.0", "--html", str(tmp_path / "page.html")])
    assert "by vLLM 0.33.0 (deepseek_v2.py:321)" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "serving" in capsys.readouterr().out


def test_a_dtype_that_config_json_does_not_name_is_not_guessed(tmp_path: Path) -> None:
    folder = write(tmp_path / "export", router(3))
    config = {key: value for key, value in DEEPSEEK.items() if key != "torch_dtype"}
    found = export.questions(open_checkpoint(folder), None, [find("vllm==0.33.0")], config)
    (weight,) = (f for f in found if f.tensor.endswith("gate.weight"))
    assert (weight.verdict, "does not name" in weight.text) == ("unknown", True)


def test_a_bias_that_the_engine_does_not_use_is_a_problem(tmp_path: Path) -> None:
    folder = write(tmp_path / "export", router(3))
    found = export.questions(
        open_checkpoint(folder), None, [find("vllm==0.33.0")], DEEPSEEK | {"topk_method": "greedy"}
    )
    (bias,) = (f for f in found if f.tensor.endswith("bias"))
    assert bias.verdict == "problem"
    assert (
        "does not use it: that needs topk_method = \"noaux_tc\" in config.json, found topk_method = 'greedy'"
        in bias.text
    )
