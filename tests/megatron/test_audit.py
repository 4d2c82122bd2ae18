"""The audit on checkpoints that this release wrote, in every format it can write here, with the plugin off and on."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version
from safetensors.numpy import load_file

import megatron_fp32_router
from megatron_fp32_router import lab
from megatron_fp32_router.audit import audit, open_checkpoint
from megatron_fp32_router.cli import main

BIAS, STEPS = 0.75, 10
#: What the distributed optimizer may write, by release; others are refused there without our doing.
SHARDINGS = {
    "fully_sharded_model_space": ("0.11", "0.15.99"),
    "dp_zero_gather_scatter": ("0.11", "99"),
    "dp_reshardable": ("0.15", "99"),
    "fully_reshardable": ("0.15", "99"),
}


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory, release: Version) -> dict[str, Path]:
    """Checkpoints by "off/torch_dist" and the like: folders with iter_0000010 and iter_0000020.

    Those of the distributed optimizer have iter_0000010 alone: "off/...", and by what the plugin protected
    "buffers/..." and "all/...".
    """
    root = tmp_path_factory.mktemp("checkpoints")
    found: dict[str, Path] = {}
    for plugin in ("off", "on"):
        with _plugin(plugin, "all"), _training(lab.Recipe(bias_start=BIAS)) as (room, batches):
            for iteration in (STEPS, 2 * STEPS):
                for _ in range(STEPS):
                    room.step(batches)
                found[f"{plugin}/torch_dist"] = _save_dist(room, root / plugin / "torch_dist", iteration, {})
                found[f"{plugin}/legacy"] = _save_legacy(room, root / plugin / "legacy", iteration)
                state = room.optimizer.sharded_state_dict(_model(room).sharded_state_dict())
                folder = root / plugin / "with_optimizer"
                found[f"{plugin}/with_optimizer"] = _save_dist(room, folder, iteration, {"optimizer": state})
    shardings = [
        name
        for name, (first, last) in SHARDINGS.items()
        if Version(first) <= Version(release.base_version) <= Version(last)
    ]
    recipe = lab.Recipe(bias_start=BIAS, optimizer="distributed", fused_adam=True, overlap=False)
    for protect in ("off", "buffers", "all"):
        plugin = "off" if protect == "off" else "on"
        with _plugin(plugin, protect), _training(recipe) as (room, batches), _fused_adam_is_known():
            for _ in range(STEPS):
                room.step(batches)
            for sharding in shardings:
                state = _distributed_state(room, sharding)
                name = f"{protect}/{sharding}"
                found[name] = _save_dist(room, root / name, STEPS, {"optimizer": state})
            name = f"{protect}/distrib_optim"
            folder = found[name] = _save_legacy(room, root / name, STEPS)
            room.optimizer.save_parameter_state(str(folder / f"iter_{STEPS:07d}/mp_rank_00/distrib_optim.pt"))
    return found


@contextmanager
def _plugin(state: str, protect: str) -> Iterator[None]:
    if state == "on":
        megatron_fp32_router.enable(protect=protect)
    try:
        yield
    finally:
        megatron_fp32_router.disable()


@contextmanager
def _training(recipe: lab.Recipe) -> Iterator[tuple[Any, Any]]:
    with lab.parallel(recipe):
        yield lab.build(recipe), lab.text_batches(recipe, seed=1)


@contextmanager
def _fused_adam_is_known() -> Iterator[None]:
    """Up to 0.12 the optimizer looks for apex, not at its Adam, to see where `step` is kept."""
    module = import_module("megatron.core.optimizer.distrib_optimizer")
    before = getattr(module, "HAVE_APEX_OR_TE", None)
    if before is not None:
        module.HAVE_APEX_OR_TE = True
    try:
        yield
    finally:
        if before is not None:
            module.HAVE_APEX_OR_TE = before


def _model(room: Any) -> Any:
    model = room.chunks[0]
    while not hasattr(model, "decoder"):
        model = model.module
    return model


def _distributed_state(room: Any, sharding: str) -> Any:
    optimizers = getattr(room.optimizer, "chained_optimizers", [room.optimizer])
    takes = inspect.signature(optimizers[0].sharded_state_dict).parameters
    how = {"sharding_type": sharding}
    if "metadata" in takes:
        how = {"metadata": {"distrib_optim_sharding_type": sharding}}  # type: ignore[dict-item]
    return room.optimizer.sharded_state_dict(_model(room).sharded_state_dict(), **how)


def _save_dist(room: Any, folder: Path, iteration: int, more: dict[str, Any]) -> Path:
    target = folder / f"iter_{iteration:07d}"
    target.mkdir(parents=True)
    args = argparse.Namespace(moe_router_bias_update_rate=room.recipe.bias_rate)
    state = {"iteration": iteration, "args": args, "model": _model(room).sharded_state_dict(), **more}
    import_module("megatron.core.dist_checkpointing").save(state, str(target))
    return folder


def _save_legacy(room: Any, folder: Path, iteration: int) -> Path:
    target = folder / f"iter_{iteration:07d}" / "mp_rank_00"
    target.mkdir(parents=True)
    model, optimizer = _model(room).state_dict_for_save_checkpoint(), room.optimizer.state_dict()
    torch.save({"iteration": iteration, "model": model, "optimizer": optimizer}, target / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return folder


def told(found: Any, kind: str, check: str) -> set[str]:
    """The verdicts on one question about all tensors of one kind."""
    names = {tensor.name for tensor in found.checkpoint.tensors if tensor.kind == kind}
    return {finding.verdict for finding in found.findings if finding.tensor in names and finding.check == check}


def test_with_the_plugin_off_a_checkpoint_is_found_damaged_in_every_format_and_why(
    written: Any, release: Version
) -> None:
    forms = [form for form in written if form.startswith("off/")]
    assert len(forms) >= 6
    for form in forms:
        is_found_damaged(form.partition("/")[2], written[form], release)


def is_found_damaged(form: str, folder: Path, release: Version) -> None:
    found = audit(open_checkpoint(folder))
    assert found.verdict == "problem"
    assert len(found.checkpoint.tensors) == 4
    assert found.checkpoint.iteration == (2 * STEPS if form in ("torch_dist", "legacy", "with_optimizer") else STEPS)
    assert found.checkpoint.rate == (None if form in ("legacy", "distrib_optim") else 1e-3)
    assert told(found, "weight", "dtype") == {"problem"}
    assert told(found, "expert_bias", "updates") == {"problem"}
    texts = " ".join(finding.text for finding in found.findings)
    if release < Version("0.12"):
        assert told(found, "expert_bias", "dtype") == {"problem"}
        assert "8 of 8 biases cannot take an update of 0.001 in bfloat16" in texts
    else:
        assert told(found, "expert_bias", "dtype") == {"good"}
        assert "0.0009994507, which is 0.001 rounded to bfloat16: the token counter was bfloat16" in texts


@pytest.mark.parametrize("plugin", ["off", "on"])
def test_few_steps_at_any_rate_are_not_called_a_cast_that_never_was(plugin: str, tmp_path: Path) -> None:
    """From 0.12 on the bias is fp32 with the plugin off as well, and its steps are the rate rounded to bf16."""
    recipe = lab.Recipe(layers=1, experts=16, topk=4, micro_batches=1, seq_length=32)
    with _plugin(plugin, "all"), _training(recipe) as (room, batches):
        router = next(module for name, module in _model(room).named_modules() if name.endswith(".router"))
        for rate in (1e-3, 5e-4, 1e-2, 2e-3, 1e-4, 2.0**-10, 2.0**-7):
            router.config.moe_router_bias_update_rate = rate
            router.expert_bias.zero_()
            for iteration in range(1, 8):
                room.step(batches)
                if iteration not in (3, 5, 7):
                    continue
                folder = _save_legacy(room, tmp_path / f"{rate}/{iteration}", iteration)
                for known in ([rate], []):
                    is_not_called_a_cast(audit(open_checkpoint(folder), rates=known))
            assert 0 < router.expert_bias.abs().max() <= 7.1 * rate


def is_not_called_a_cast(found: Any) -> None:
    """No claim that a tensor which the audit could tell of went through a cast."""
    assert told(found, "expert_bias", "updates")
    assert told(found, "expert_bias", "laundered") <= {"good", "unknown"}
    assert not [finding.text for finding in found.findings if "grid, which" in finding.text]


def test_with_the_plugin_on_a_checkpoint_is_found_clean_in_every_format(written: Any) -> None:
    forms = [form for form in written if form.startswith(("on/", "all/"))]
    assert len(forms) >= 6
    for form in forms:
        is_found_clean(written[form])


def is_found_clean(folder: Path) -> None:
    found = audit(open_checkpoint(folder))
    assert found.verdict == "good"
    assert len(found.checkpoint.tensors) == 4
    for kind, check in (
        ("weight", "dtype"),
        ("weight", "laundered"),
        ("expert_bias", "dtype"),
        ("expert_bias", "laundered"),
        ("expert_bias", "updates"),
    ):
        assert told(found, kind, check) == {"good"}, (folder.parent.name, folder.name, kind, check)


@pytest.mark.parametrize("plugin", ["off", "on"])
def test_step_20_against_step_10_says_which_defect_it_sees(written: Any, plugin: str, release: Version) -> None:
    folder = written[f"{plugin}/torch_dist"]
    late, early = (open_checkpoint(folder / f"iter_{n:07d}") for n in (2 * STEPS, STEPS))
    found = audit(late, early)
    texts = " ".join(finding.text for finding in found.findings if finding.check == "against")
    assert told(found, "expert_bias", "against") == {"good" if plugin == "on" else "problem"}
    if plugin == "off":
        swallowed = "no bias moved in 10 iterations: 8 of 8 are so large that bfloat16 rounds a step of 0.001 away"
        counter = "the steps are 0.0009994507, which is 0.001 rounded to bfloat16: the token counter was bfloat16"
        assert (swallowed if release < Version("0.12") else counter) in texts


def test_bits_that_were_read_are_the_bits_that_torch_reads(written: Any) -> None:
    path = written["on/legacy"] / f"iter_{2 * STEPS:07d}" / "mp_rank_00" / "model_optim_rng.pt"
    truth = torch.load(path, weights_only=False)["model"]
    for form in ("legacy", "torch_dist"):
        for tensor in open_checkpoint(written[f"on/{form}"]).tensors:
            assert tensor.values is not None
            assert tensor.values.dtype == np.float32
            assert np.array_equal(tensor.values.view(np.int32), truth[tensor.name].view(torch.int32).numpy())


def test_main_copies_are_found_and_restored_bit_for_bit_in_every_format(written: Any, tmp_path: Path) -> None:
    forms = [form for form in written if form.startswith(("off/", "buffers/")) and form != "off/torch_dist"]
    assert len(forms) >= 5
    for form in forms:
        restores(form, written[form], tmp_path / form)


def restores(form: str, folder: Path, tmp_path: Path) -> None:
    """Repair takes the weights' main copies, names what has none, and leaves every byte of the checkpoint alone."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code = main(["audit", str(folder), "--repair", str(tmp_path / "out"), "--json", "--protect", "buffers"])
    assert code == (1 if form.startswith("off") else 0)
    report = json.loads((tmp_path / "out" / "repair.json").read_text())
    weights = {f"decoder.layers.{layer}.mlp.router.weight" for layer in (0, 1)}
    assert set(report["restored"]) == weights
    restored = load_file(tmp_path / "out" / "router.safetensors")
    for tensor in open_checkpoint(folder).tensors:
        if tensor.kind == "weight":
            assert restored[tensor.name].dtype == np.float32
            assert np.array_equal(restored[tensor.name].astype(tensor.values.dtype), tensor.values)  # type: ignore[union-attr]
            assert np.any(restored[tensor.name] != tensor.values.astype(np.float32))  # type: ignore[union-attr]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    if form.startswith("off"):
        assert set(report["not_restored"]) == {name.replace("weight", "expert_bias") for name in weights}


def test_the_main_copy_that_is_restored_is_the_optimizers_own(written: Any) -> None:
    path = written["off/legacy"] / f"iter_{2 * STEPS:07d}" / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)["optimizer"]
    copies = [copy.numpy() for group in state["fp32_from_fp16_params"] for copy in group]
    for form in ("off/legacy", "off/with_optimizer"):
        for tensor in open_checkpoint(written[form]).tensors:
            if tensor.kind == "weight":
                assert any(np.array_equal(copy, tensor.main) for copy in copies if tensor.main is not None)


def test_protect_buffers_leaves_weights_in_bf16_and_the_audit_can_be_told_so(written: Any) -> None:
    checkpoint = open_checkpoint(written["buffers/distrib_optim"])
    assert audit(checkpoint).verdict == "problem"
    assert audit(checkpoint, protect="buffers").verdict == "good"
