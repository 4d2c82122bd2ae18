"""The audit's readers on files that torch and safetensors wrote."""

from __future__ import annotations

import argparse
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from megatron_fp32_router.audit import open_checkpoint
from megatron_fp32_router.audit.tensors import kind_of
from megatron_fp32_router.cli import main
from megatron_fp32_router.errors import CheckpointUnreadableError

EXPERTS, HIDDEN = 8, 16


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(seed))


def bits(values: Any) -> list[int]:
    """Of a NumPy array or a tensor of any dtype, as bytes."""
    if isinstance(values, torch.Tensor):
        values = values.contiguous().view(torch.uint8).numpy()
    return list(np.ascontiguousarray(values).tobytes())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_safetensors_are_read_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    truth = {
        "model.layers.3.mlp.gate.weight": weight().to(dtype),
        "model.layers.3.mlp.gate.e_score_correction_bias": weight()[0].to(dtype),
        "model.layers.3.mlp.experts.0.gate_proj.weight": weight(),
    }
    save_file(truth, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = open_checkpoint(path)
        assert [tensor.kind for tensor in found.tensors] == ["expert_bias", "weight"]
        for tensor in found.tensors:
            assert f"torch.{tensor.dtype}" == str(dtype)
            assert bits(tensor.values) == bits(truth[tensor.name])


def test_of_a_sharded_model_only_the_files_that_hold_routers_are_opened(tmp_path: Path) -> None:
    gate = {f"model.layers.{layer}.block_sparse_moe.gate.weight": weight(layer).bfloat16() for layer in range(4)}
    for layer, (name, value) in enumerate(gate.items()):
        save_file({name: value}, tmp_path / f"model-0000{layer}-of-00005.safetensors")
    names = {name: f"model-0000{layer}-of-00005.safetensors" for layer, name in enumerate(gate)}
    # No such file is there: whoever opens it fails.
    names["model.embed_tokens.weight"] = "model-00004-of-00005.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    found = open_checkpoint(tmp_path)
    assert [tensor.key for tensor in found.tensors] == [("decoder", layer, "weight") for layer in range(4)]
    names["model.layers.9.block_sparse_moe.gate.weight"] = "model-00003-of-00005.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(CheckpointUnreadableError, match=r"expected model\.layers\.9\.block_sparse_moe\.gate\.weight"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("whole", [True, False])
def test_iteration_and_rate_are_read_from_what_torch_dcp_and_fsdp_dtensor_write(tmp_path: Path, whole: bool) -> None:
    # Megatron's generate_state_dict, given to torch.distributed.checkpoint.save as it is.
    args = argparse.Namespace(moe_router_bias_update_rate=7.7e-4, num_layers=1)
    state = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 30,
        "model": {"module.decoder.layers.0.mlp.router.weight": weight()},
        "opt_param_scheduler": {"num_steps": 480},
        "rng_state": {"(0, 0)": [{"random_rng_state": (3, (1, 2), None)}]},
        "num_floating_point_operations_so_far": 1.5,
    }
    dcp.save(state if whole else {"model": state["model"]}, checkpoint_id=tmp_path, no_dist=True)
    found = open_checkpoint(tmp_path)
    assert (found.iteration, found.rate) == ((30, 7.7e-4) if whole else (None, None))
    assert [tensor.kind for tensor in found.tensors] == ["weight"]


def test_eight_bit_floats_are_named_though_they_are_not_read(tmp_path: Path) -> None:
    save_file({"model.layers.0.mlp.gate.weight": weight().to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    (tensor,) = open_checkpoint(tmp_path).tensors
    assert (tensor.dtype, tensor.shape, tensor.values) == ("float8_e4m3fn", (EXPERTS, HIDDEN), None)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.mlp.gate.weight", "weight"),  # DeepSeek-V3, Qwen3-MoE, GLM-4.5, Kimi-K2, Ling
        ("model.layers.3.mlp.gate.e_score_correction_bias", "expert_bias"),  # DeepSeek-V3, GLM-4.5, Kimi-K2
        ("model.layers.3.mlp.gate.expert_bias", "expert_bias"),  # Ling
        ("model.layers.3.block_sparse_moe.gate.weight", "weight"),  # Mixtral, MiniMax
        ("model.layers.3.block_sparse_moe.e_score_correction_bias", "expert_bias"),  # MiniMax-M2
        ("model.layers.3.mlp.router.weight", "weight"),  # gpt-oss
        ("model.layers.3.mlp.router.bias", "bias"),
        ("language_model.model.layers.3.feed_forward.router.weight", "weight"),  # Llama 4
        ("model.layers.3.mlp.moe_statics.e_score_correction_bias", "expert_bias"),  # ERNIE 4.5
        ("model.layers.3.mlp.router.classifier.weight", "weight"),  # LongCat
        ("backbone.layers.3.mixer.gate.e_score_correction_bias", "expert_bias"),  # Nemotron-H
        ("decoder.layers.0.mlp.router.expert_bias", "expert_bias"),
        ("model.layers.3.mlp.gate_proj.weight", None),
        ("model.layers.3.mlp.shared_expert_gate.weight", None),
        ("model.layers.3.mlp.experts.0.gate_proj.weight", None),
        ("model.layers.3.self_attn.gate.weight", None),
    ],
)
def test_router_tensors_are_known_by_name(name: str, kind: str | None) -> None:
    assert kind_of(name, hugging_face=True) == kind


def test_dcp_as_fsdp_writes_it_is_read_bit_for_bit(tmp_path: Path) -> None:
    name = "model.module.decoder.layers.1.mlp.router.weight"
    truth = {
        name: weight().bfloat16(),
        "model.module.decoder.layers.1.mlp.router.expert_bias": weight()[0],
        f"optimizer.state.{name}.master_param": weight(),
        f"optimizer.state.{name}.exp_avg": torch.zeros(EXPERTS, HIDDEN),
        "model.module.embedding.weight": torch.zeros(100, HIDDEN),
    }
    dcp.save(truth, checkpoint_id=tmp_path, no_dist=True)
    found = open_checkpoint(tmp_path)
    assert [tensor.kind for tensor in found.tensors] == ["expert_bias", "weight"]
    for tensor in found.tensors:
        assert bits(tensor.values) == bits(truth[tensor.name])
    assert bits(found.tensors[1].main) == bits(truth[f"optimizer.state.{name}.master_param"])


def test_metadata_that_0_15_writes_as_a_class_of_its_own_is_read(tmp_path: Path) -> None:
    name = "decoder.layers.1.mlp.router.weight"
    dcp.save({name: weight()}, checkpoint_id=tmp_path, no_dist=True)
    file = tmp_path / ".metadata"
    # Protocol 2 names classes in full and has no frames, so that a name may change its length.
    written = pickle.dumps(pickle.loads(file.read_bytes()), protocol=2)
    ours, theirs = b"ctorch.distributed.checkpoint.metadata\nMetadata\n", b"cmegatron.core.a.torch\nMCoreMetadata\n"
    assert written.count(ours) == 1
    file.write_bytes(written.replace(ours, theirs))
    (found,) = open_checkpoint(tmp_path).tensors
    assert bits(found.values) == bits(weight())


@pytest.mark.parametrize("whole", [weight().t().contiguous().t(), weight().repeat(2, 2)[::2, 3:9]], ids=["t", "slice"])
def test_strided_views_of_a_storage_are_read_as_torch_reads_them(tmp_path: Path, whole: torch.Tensor) -> None:
    folder = tmp_path / "iter_0000007" / "mp_rank_00"
    folder.mkdir(parents=True)
    model = {"decoder.layers.0.mlp.router.weight": torch.nn.Parameter(whole)}
    torch.save({"iteration": 7, "model": model}, folder / "model_optim_rng.pt")
    (tensor,) = open_checkpoint(tmp_path).tensors
    assert bits(tensor.values) == bits(whole.detach())


def test_layers_of_pipeline_stages_and_virtual_chunks_are_counted_through(tmp_path: Path) -> None:
    def chunk(first: int) -> dict[str, Any]:
        return {f"decoder.layers.{i}.mlp.router.weight": torch.full((2, 3), float(first + i)) for i in range(2)}

    for stage in range(2):
        folder = tmp_path / f"mp_rank_00_{stage:03d}"
        folder.mkdir()
        state = {"model0": chunk(2 * stage), "model1": chunk(4 + 2 * stage), "iteration": 5}
        torch.save(state, folder / "model_optim_rng.pt")
        (tmp_path / f"mp_rank_01_{stage:03d}").mkdir()
        (tmp_path / f"mp_rank_01_{stage:03d}" / "model_optim_rng.pt").write_bytes(b"another tensor rank: not read")
    found = open_checkpoint(tmp_path)
    assert [(t.key[1], float(t.values[0, 0])) for t in found.tensors if t.values is not None] == [
        (layer, float(layer)) for layer in range(8)
    ]


def test_arguments_give_the_rate_and_tell_expert_ranks_from_pipeline_stages(tmp_path: Path) -> None:
    import argparse

    args = argparse.Namespace(pipeline_model_parallel_size=1, moe_router_bias_update_rate=0.002)
    for rank in range(2):
        folder = tmp_path / f"mp_rank_00_{rank:03d}"
        folder.mkdir()
        model = {"decoder.layers.0.mlp.router.weight": weight(rank)}
        torch.save({"args": args, "model": model}, folder / "model_optim_rng.pt")
    found = open_checkpoint(tmp_path)
    assert found.rate == 0.002
    assert len(found.tensors) == 1


def test_the_last_iteration_is_read_where_a_folder_holds_several(tmp_path: Path) -> None:
    for iteration in (5, 10, 200):
        folder = tmp_path / f"iter_{iteration:07d}" / "mp_rank_00"
        folder.mkdir(parents=True)
        torch.save({"model": {"decoder.layers.0.mlp.router.weight": weight()}}, folder / "model_optim_rng.pt")
    assert open_checkpoint(tmp_path).iteration == 200
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10\n")
    assert open_checkpoint(tmp_path).iteration == 10


def test_a_main_copy_is_found_in_the_middle_of_a_flat_buffer_and_only_up_to_the_limit(tmp_path: Path) -> None:
    folder = tmp_path / "mp_rank_00"
    folder.mkdir()
    main = weight(3)
    flat = torch.cat([weight(1).flatten(), torch.zeros(7), main.flatten(), weight(2).flatten()])
    state = {"model": {"decoder.layers.0.mlp.router.weight": main.bfloat16()}}
    torch.save(state, folder / "model_optim_rng.pt")
    buffers = {0: {(torch.bfloat16, torch.float32): {"param": flat, "exp_avg": flat}}}
    torch.save(buffers, folder / "distrib_optim.pt")
    (tensor,) = open_checkpoint(tmp_path).tensors
    assert bits(tensor.main) == bits(main)
    limited = open_checkpoint(tmp_path, search_limit=100)
    assert limited.tensors[0].main is None
    assert "--search-limit" in limited.notes[0]


def test_a_copy_that_lies_across_two_blocks_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_fp32_router.audit import main_copies

    folder = tmp_path / "mp_rank_00"
    folder.mkdir()
    main = weight(3)
    torch.save({"model": {"decoder.layers.0.mlp.router.weight": main.half()}}, folder / "model_optim_rng.pt")
    flat = torch.cat([torch.ones(100), main.flatten()])
    torch.save({0: {"d": {"param": flat}}}, folder / "distrib_optim.pt")
    for block in (1, 7, 64, 101, 1000):
        monkeypatch.setattr(main_copies, "_BLOCK", block)
        (tensor,) = open_checkpoint(tmp_path).tensors
        assert bits(tensor.main) == bits(main)


def _stages(folder: Path) -> dict[str, torch.Tensor]:
    """Two pipeline stages in the legacy format, with MTP on the last; the weights by their names in the whole model."""
    truth = {}
    for stage in range(2):
        model = {f"decoder.layers.{i}.mlp.router.weight": weight(10 * stage + i).bfloat16() for i in range(2)}
        truth |= {f"decoder.layers.{2 * stage + i}.mlp.router.weight": model[n] for i, n in enumerate(model)}
        if stage == 1:
            name = "mtp.layers.0.transformer_layer.mlp.router.weight"
            truth[name] = model[name] = weight(99).bfloat16()
        copies = [value.float() * (1 + 2.0**-12) for value in model.values()]
        place = folder / f"mp_rank_00_{stage:03d}"
        place.mkdir(parents=True)
        args = argparse.Namespace(pipeline_model_parallel_size=2)
        state = {"model": model, "args": args, "optimizer": {"fp32_from_fp16_params": [copies]}}
        torch.save(state, place / "model_optim_rng.pt")
    return truth


def test_legacy_stages_are_counted_through_and_mtp_by_itself(tmp_path: Path) -> None:
    truth = _stages(tmp_path)
    found = {tensor.name: tensor for tensor in open_checkpoint(tmp_path).tensors}
    assert set(found) == set(truth)
    for name, value in truth.items():
        assert bits(found[name].values) == bits(value)
    assert {tensor.key for tensor in found.values()} == {
        *(("decoder", layer, "weight") for layer in range(4)),
        ("mtp", 0, "weight"),
    }


def test_the_documented_lines_load_a_repaired_bias_into_its_layer_on_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = _stages(tmp_path / "checkpoint")
    assert main(["audit", str(tmp_path / "checkpoint"), "--repair", str(tmp_path / "OUT")]) == 1
    text = (Path(__file__).parents[1] / "docs" / "audit.md").read_text()
    lines = text.partition("## Repair")[2].partition("```python\n")[2].partition("```")[0]

    def layer(number: int) -> torch.nn.Module:
        """`mlp.router` with the attributes that Megatron's has."""
        router = torch.nn.Linear(HIDDEN, EXPERTS, bias=False)
        router.layer_number = number  # type: ignore[assignment]
        return torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"router": router})})

    # The second stage: names count from 0, layer numbers go on; MTP's number is another in every release.
    stage = torch.nn.ModuleDict(
        {
            "decoder": torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer(3), layer(4)])}),
            "mtp": torch.nn.ModuleDict(
                {"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"transformer_layer": layer(7)})])}
            ),
        }
    )
    monkeypatch.chdir(tmp_path)
    exec(lines, {"safetensors": safetensors, "json": json, "re": re, "model": [stage]})
    parameters = dict(stage.named_parameters())
    for name, source in (
        ("decoder.layers.0.mlp.router.weight", "decoder.layers.2.mlp.router.weight"),
        ("decoder.layers.1.mlp.router.weight", "decoder.layers.3.mlp.router.weight"),
        ("mtp.layers.0.transformer_layer.mlp.router.weight", "mtp.layers.0.transformer_layer.mlp.router.weight"),
    ):
        assert torch.equal(parameters[name], truth[source].float() * (1 + 2.0**-12))
