"""`audit EXPORT --against B --repair OUT --router-dtype`: a copy of an export, with the routers of training."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file

from megatron_fp32_router.audit import open_checkpoint
from megatron_fp32_router.cli import main

CORPUS = Path(__file__).resolve().parent / "corpus" / "audit"
#: Trained with the plugin: an fp32 router in layer 0.
TRAINED = CORPUS / "0.19.2-on-torch_dist"
WEIGHT, BIAS = "model.layers.{}.mlp.gate.weight", "model.layers.{}.mlp.gate.e_score_correction_bias"


def trained() -> dict[tuple[int, str], np.ndarray]:
    return {
        (tensor.key[1], tensor.kind): tensor.values
        for tensor in open_checkpoint(TRAINED).tensors
        if tensor.kind in ("weight", "expert_bias") and tensor.values is not None
    }


def export(folder: Path, *, shards: bool = False) -> Path:
    """Weights rounded to bf16, no biases: what converters that do not know the bias leave."""
    folder.mkdir()
    layers = []
    for layer in (0, 1):
        layers.append({f"model.layers.{layer}.mlp.up_proj.weight": np.arange(6 + layer, dtype=np.float16)})
    layers[0][WEIGHT.format(0)] = trained()[0, "weight"].astype(bfloat16)
    if shards:
        names = {}
        for number, tensors in enumerate(layers):
            save_file(tensors, folder / f"model-{number}.safetensors", metadata={"format": "pt"})
            names |= dict.fromkeys(tensors, f"model-{number}.safetensors")
        index = {"metadata": {"total_size": 1}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    else:
        save_file(layers[0] | layers[1], folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["DeepseekV3ForCausalLM"], "topk_method": "noaux_tc", "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shards", [False, True])
def test_an_export_that_lost_its_routers_is_copied_with_those_of_training(
    dtype: str, shards: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = export(tmp_path / "export", shards=shards), tmp_path / "out"
    before = contents(folder)
    main(["audit", str(folder), "--against", str(TRAINED), "--repair", str(out), "--router-dtype", dtype])
    assert f"repair: 1 router tensors replaced and 1 added, {dtype}" in capsys.readouterr().out
    assert contents(folder) == before
    assert contents(out)["config.json"] == before["config.json"]
    found: dict[str, np.ndarray] = {}
    for file in sorted(out.glob("*.safetensors")):
        tensors = load_file(file)
        assert not found.keys() & tensors.keys()
        found |= tensors
    numpy_dtype = np.float32 if dtype == "float32" else bfloat16
    for name, kind in ((WEIGHT, "weight"), (BIAS, "expert_bias")):
        values = found.pop(name.format(0))
        assert values.dtype == numpy_dtype
        assert values.tobytes() == trained()[0, kind].astype(numpy_dtype).tobytes()
    for layer in (0, 1):
        up = found.pop(f"model.layers.{layer}.mlp.up_proj.weight")
        assert up.tobytes() == np.arange(6 + layer, dtype=np.float16).tobytes()
    assert not found
    if shards:
        index = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))
        assert index["weight_map"][BIAS.format(0)] == "model-0.safetensors"
        assert index["metadata"]["total_size"] == sum(
            values.nbytes for file in out.glob("*.safetensors") for values in load_file(file).values()
        )
    again = [tensor for tensor in open_checkpoint(out).tensors if tensor.kind == "expert_bias"]
    assert len(again) == 1


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    folder = export(tmp_path / "export")
    config = folder / "config.json"
    config.write_text(config.read_text().replace("DeepseekV3", "Unheard"), encoding="utf-8")
    tensors = load_file(folder / "model.safetensors")
    tensors[WEIGHT.format(0)] = tensors[WEIGHT.format(0)][:, :4].copy()
    save_file(tensors, folder / "model.safetensors")
    main(["audit", str(folder), "--against", str(TRAINED), "--repair", str(tmp_path / "out"), "--router-dtype=float32"])
    said = json.loads((tmp_path / "out" / "repair.json").read_text(encoding="utf-8"))
    assert said["replaced"] == []
    assert said["added"] == []
    assert sorted(why.split(",")[0] for why in said["not_written"].values()) == [
        "its shape is (6",
        "the export has no router in this layer",
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b'{"architectures": "DeepseekV3ForCausalLM"}'),
        ("model-1.safetensors", b"\0" * 4),
        ("model-1.safetensors", (2).to_bytes(8, "little") + b"{]"),
        ("model-1.safetensors", None),
        ("model.safetensors.index.json", b"[]"),
    ],
    ids=["config", "architectures", "shard", "header", "truncated", "index"],
)
def test_a_damaged_export_is_refused_by_name_before_anything_is_written(
    name: str, content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = export(tmp_path / "export", shards=True), tmp_path / "out"
    file = folder / name
    file.write_bytes(file.read_bytes()[:-1] if content is None else content)
    assert main(["audit", str(folder), "--against", str(TRAINED), "--repair", str(out), "--router-dtype=float32"]) == 2
    assert f"{file}: " in capsys.readouterr().err
    assert not out.exists()


def test_a_combination_that_makes_no_sense_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = export(tmp_path / "export")
    out = ["--repair", str(tmp_path / "out"), "--router-dtype", "float32"]
    assert main(["audit", str(folder), *out]) == 2
    assert "--router-dtype goes with --repair OUT and --against CHECKPOINT" in capsys.readouterr().err
    assert main(["audit", str(TRAINED), "--against", str(folder), *out]) == 2
    assert "takes the folder of an export to safetensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
