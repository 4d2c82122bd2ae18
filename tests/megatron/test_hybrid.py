"""HybridModel's own: layers without experts are counted too, and multi-token prediction has layers in each depth.

Whatever is asked with the `build` fixture is asked of a HybridModel in the same words (conftest.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import load_file

import megatron_fp32_router
from megatron_fp32_router import lab
from megatron_fp32_router.audit import audit, open_checkpoint
from megatron_fp32_router.cli import main
from megatron_fp32_router.lab import checkpoint

pytestmark = pytest.mark.since("0.19")

TINY: dict[str, Any] = {"hidden": 32, "heads": 2, "moe_ffn": 32, "seq_length": 32, "micro_batches": 1}
NAMES = [
    *(f"decoder.layers.{layer}.mlp.router" for layer in (1, 3)),
    *(f"mtp.layers.{depth}.mtp_model_layer.layers.{layer}.mlp.router" for depth in (0, 1) for layer in (1, 2)),
]
LAYERS = [2, 4, "mtp 1.2", "mtp 1.3", "mtp 2.2", "mtp 2.3"]


@pytest.fixture
def hybrid(request: pytest.FixtureRequest) -> Callable[..., lab.Lab]:
    """`hybrid(**recipe)`: the pattern is "*E*E/*EE/*EE": two depths, whose layers Megatron numbers from 1 in each."""
    return partial(request.getfixturevalue("build"), model="hybrid", mtp=2, **TINY)


@pytest.mark.parametrize("fields", [{}, {"recompute": True}, {"extra": {"mtp_use_repeated_layer": True}}])
def test_every_bias_is_what_integers_make_of_the_tokens_of_its_layer(fields: Any, hybrid: Any, plugin: Any) -> None:
    room = hybrid(**fields, bias_start=0.75)
    routers = dict(room.routers())
    expected = {name: np.full(8, 0.75, dtype=np.float32) for name in routers}
    room.record_routing()
    batches = lab.text_batches(room.recipe, seed=1)
    for _ in range(3):
        room.step(batches)
        for name, maps in room.routing_maps.items():
            counts = torch.cat(maps).sum(dim=0).numpy()
            expected[name] += np.sign(counts.sum() - 8 * counts).astype(np.float32) * np.float32(1e-3)
    assert len(routers) == (4 if fields.get("extra") else 6)
    for name, router in routers.items():
        assert router.weight.dtype == router.expert_bias.dtype == torch.float32
        assert (router.expert_bias.numpy() == expected[name]).all(), name


def test_routers_among_mamba_layers_are_fp32_and_balanced_by_integers(hybrid: Any, plugin: Any) -> None:
    def trained() -> tuple[lab.Lab, dict[str, np.ndarray]]:
        room = hybrid(mamba=True, mtp=0, bias_start=0.75)
        exact = {name: np.full(8, 0.75, dtype=np.float32) for name, _ in room.routers()}
        before = {name: p.detach().clone() for name, p in room.chunks[0].named_parameters() if ".mixer." in name}
        room.record_routing()
        batches = lab.text_batches(room.recipe, seed=1)
        for _ in range(3):
            room.step(batches)
            for name, maps in room.routing_maps.items():
                counts = torch.cat(maps).sum(dim=0).numpy()
                exact[name] += np.sign(counts.sum() - 8 * counts).astype(np.float32) * np.float32(1e-3)
        moved = [name for name, p in room.chunks[0].named_parameters() if name in before and (p != before[name]).any()]
        # Of the others the steps are too small for bf16, and wait in main copies.
        products = [name for name in moved if name.endswith(("in_proj.weight", "conv1d_weight", "out_proj.weight"))]
        assert len(products) == 6
        return room, exact

    for turned_on in (True, False):
        if not turned_on:
            megatron_fp32_router.disable()
        room, exact = trained()
        routers = dict(room.routers())
        assert [name.rpartition("decoder.")[2] for name in routers] == ["layers.2.mlp.router", "layers.5.mlp.router"]
        dtypes = {(router.weight.dtype, router.local_tokens_per_expert.dtype) for router in routers.values()}
        assert dtypes == {(torch.float32, torch.float64) if turned_on else (torch.bfloat16, torch.bfloat16)}
        # Without the plugin a step of 1e-3 is one of bf16.
        held = [(router.expert_bias.float().numpy() == exact[name]).all() for name, router in routers.items()]
        assert held == [turned_on] * 2


def test_the_monitor_calls_each_layer_by_a_name_of_its_own(
    hybrid: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MEGATRON_FP32_ROUTER_MONITOR", "2")
    monkeypatch.setenv("MEGATRON_FP32_ROUTER_MONITOR_DIR", str(tmp_path))
    megatron_fp32_router.enable()
    try:
        room = hybrid()
        batches = lab.text_batches(room.recipe, seed=1)
        for _ in range(2):  # ends with the look: no hook of a next one is on
            room.step(batches)
    finally:
        megatron_fp32_router.disable()
    records = [json.loads(line) for line in (tmp_path / "monitor.jsonl").read_text().splitlines()]
    assert [record["layer"] for record in records] == [*LAYERS, "all"]
    for record in records[:-1]:
        assert record["metrics"]["load/assignments"] > 0 == record["metrics"]["flips/actual"]


def test_an_error_names_the_depth_and_its_layer(hybrid: Any, plugin: Any) -> None:
    room = hybrid()
    routers = dict(room.routers())
    broken = routers[f"module.module.{NAMES[-1]}"]
    broken.expert_bias = broken.expert_bias.bfloat16()
    with pytest.raises(megatron_fp32_router.UnprotectedRouterError) as caught:
        room.step(lab.text_batches(room.recipe, seed=1))
    assert f"{NAMES[-1]} (MTP layer 2.3, pipeline stage 0" in str(caught.value)
    model = room.chunks[0].module.module
    with pytest.raises(megatron_fp32_router.UnprotectedRouterError) as caught:
        import_module("megatron.core.transformer.module").Float16Module(model.config, model)
    assert f"{NAMES[-1]}.expert_bias (torch.bfloat16; MTP layer 2.3, pipeline stage 0" in str(caught.value)


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_the_audit_tells_layers_of_one_depth_apart_and_restores_each(
    form: str, hybrid: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the plugin off: every weight on disk is rounded, and its main copy is not."""
    room = hybrid()
    batches = lab.text_batches(room.recipe, seed=1)
    for folder in ("early", "late"):
        for _ in range(3):
            room.step(batches)
        checkpoint.save(room, tmp_path / folder, form)
        if form == "torch":  # as megatron.training names it
            place = tmp_path / folder / "mp_rank_00"
            place.mkdir()
            (tmp_path / folder / "rank-0.pt").rename(place / "model_optim_rng.pt")
    late = open_checkpoint(tmp_path / "late")
    assert {tensor.name.rpartition(".")[0] for tensor in late.tensors} == set(NAMES)
    keys = [("decoder", 1), ("decoder", 3), *((f"mtp.{depth}", layer) for depth in (0, 1) for layer in (1, 2))]
    assert {tensor.key for tensor in late.tensors if tensor.kind == "weight"} == {(*key, "weight") for key in keys}
    moved = [f for f in audit(late, open_checkpoint(tmp_path / "early")).findings if f.check == "against"]
    assert len(moved) == len(late.tensors)
    assert not [finding.text for finding in moved if "has no such tensor" in finding.text]
    assert main(["audit", str(tmp_path / "late"), "--repair", str(tmp_path / "out")]) == 1
    report = json.loads((tmp_path / "out" / "repair.json").read_text())
    restored = load_file(tmp_path / "out" / "router.safetensors")
    assert set(report["restored"]) == set(restored) == {f"{name}.weight" for name in NAMES}
    for name, router in room.routers():
        main_copy = room.main_weight(router.weight).numpy()
        assert np.array_equal(restored[f"{name.removeprefix('module.module.')}.weight"], main_copy)
    # The lines of docs/audit.md find each of them in a new model.
    text = (Path(__file__).parents[2] / "docs" / "audit.md").read_text()
    lines = text.partition("## Repair")[2].partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    (model,) = lab.build_model(room.recipe)
    exec(lines.replace("OUT", "out"), {"safetensors": safetensors, "json": json, "re": re, "model": [model]})
    parameters = dict(model.named_parameters())
    assert all(np.array_equal(parameters[name].detach().numpy(), value) for name, value in restored.items())
