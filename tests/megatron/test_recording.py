"""What a look writes down of the routers' inputs, and that `parity` finds the monitor's own flips in it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_fp32_router
from megatron_fp32_router import cli, lab
from megatron_fp32_router.monitor import recording, stability
from megatron_fp32_router.patching.registry import registry

pytestmark = pytest.mark.on_lines("0.11", "0.19")

TINY: dict[str, Any] = {"hidden": 32, "heads": 2, "moe_ffn": 32, "micro_batches": 1, "seq_length": 256}

RECIPES: dict[str, dict[str, Any]] = {
    "sigmoid with biases around 7": {"bias_start": 7.0},
    "groups": {"topk": 4, "extra": {"moe_router_num_groups": 4, "moe_router_group_topk": 2}},
    "softmax": {"score_function": "softmax", "expert_bias": False},
}


def train(build: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, record: str, looks: int, **recipe: Any) -> None:
    """Two steps a look."""
    monkeypatch.setenv("MEGATRON_FP32_ROUTER_MONITOR", "2")
    monkeypatch.setenv("MEGATRON_FP32_ROUTER_MONITOR_DIR", str(folder))
    monkeypatch.setenv("MEGATRON_FP32_ROUTER_MONITOR_RECORD", record)
    megatron_fp32_router.disable()
    megatron_fp32_router.enable()
    try:
        room = build(**{**TINY, **recipe})
        # Logits far enough apart, and close enough, that every rounding sends some token elsewhere.
        for _, router in room.routers():
            router.weight.data.normal_(generator=torch.Generator().manual_seed(1))
        batches = lab.text_batches(room.recipe, seed=1)
        for _ in range(2 * looks):
            room.step(batches)
    finally:
        megatron_fp32_router.disable()


def flips(file: Path) -> dict[tuple[int, int], dict[str, float]]:
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return {
        (record["step"], record["layer"]): {
            name.removeprefix("flips/"): value
            for name, value in record["metrics"].items()
            if name.startswith("flips/") and name != "flips/actual"
        }
        for record in records
        if record["layer"] != "all"
    }


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_parity_on_recorded_inputs_finds_exactly_the_flips_that_the_monitor_found(
    recipe: dict[str, Any],
    build: Any,
    expert_layers: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    train(build, tmp_path, monkeypatch, "512", looks=2, **recipe)
    expected = flips(tmp_path / "monitor.jsonl")
    assert any(value for found in expected.values() for value in found.values())
    capsys.readouterr()
    for step in (2, 4):
        # The folder stands for its newest look.
        path = tmp_path / f"inputs-{step:09d}-stage-0.npz" if step == 2 else tmp_path
        assert cli.main(["parity", str(path), "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["step"] == step
        assert [layer["layer"] for layer in said["layers"]] == list(expert_layers)
        for layer in said["layers"]:
            assert layer["tokens"] == 512
            assert layer["monitor"] == expected[step, layer["layer"]]


def test_what_is_recorded_is_what_the_routers_were_given_bit_for_bit(
    build: Any, expert_layers: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[torch.Tensor] = []
    biases: list[torch.Tensor] = []

    def with_a_witness(**recipe: Any) -> Any:
        room = build(**recipe)
        _, router = room.routers()[0]

        def see(router: Any, args: Any) -> None:
            given.append(args[0].detach().clone())
            biases.append(router.expert_bias.clone())

        router.register_forward_pre_hook(see)
        return room

    train(with_a_witness, tmp_path, monkeypatch, "32", looks=1)
    step, layers = recording.read(tmp_path)
    assert step == 2
    tensors = layers[expert_layers[0]].tensors
    hidden_TH = given[1].reshape(-1, 32)
    assert hidden_TH.dtype == torch.bfloat16
    assert torch.equal(tensors["hidden"], hidden_TH[::16].float())
    assert torch.equal(tensors["expert_bias"], biases[1])
    assert not torch.equal(biases[1], biases[0])
    assert tensors["weight"].shape == (8, 32)


def test_a_router_that_moves_on_before_the_file_is_written_does_not_change_what_is_in_it(router: Any) -> None:
    """As where somebody has replaced the balance update: the look is then closed one step later."""
    made = router(expert_bias=False)
    before = made.weight.detach().clone()
    sample = stability.Sample(torch.randn(4, before.shape[1]), None)
    megatron_fp32_router.enable()
    registry.settings = replace(registry.settings, monitor_record=4)
    try:
        kept = recording.copied(made, None, sample)
    finally:
        megatron_fp32_router.disable()
    made.weight.data.add_(1)
    assert torch.equal(kept.tensors["weight"], before)


def test_only_the_newest_four_looks_are_kept_and_nothing_is_written_unless_asked_for(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(build, tmp_path / "off", monkeypatch, "0", looks=1)
    assert not list((tmp_path / "off").glob("inputs*"))
    train(build, tmp_path / "on", monkeypatch, "8", looks=6)
    names = sorted(file.name for file in (tmp_path / "on").glob("*.npz"))
    assert names == [f"inputs-{step:09d}-stage-0.npz" for step in (6, 8, 10, 12)]
    assert len(list((tmp_path / "on").glob("inputs*"))) == 4  # and nothing that was half written


def test_a_file_that_cannot_be_written_is_a_warning_and_the_training_goes_on(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recording.np, "savez", full)
    train(build, tmp_path, monkeypatch, "8", looks=2)
    assert caplog.text.count("so some are missing there: [Errno 28] No space left on device") == 1
    assert len(flips(tmp_path / "monitor.jsonl")) == 4
    assert not list(tmp_path.glob("inputs-*.npz"))
