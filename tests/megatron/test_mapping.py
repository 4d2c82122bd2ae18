"""Optimizer state by gradient buffer, across on and off: where each setting has it, and how it is read."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from packaging.version import Version
from programs import resume, unrepaired
from torch.distributed.checkpoint import FileSystemReader

import megatron_fp32_router
from megatron_fp32_router import lab
from megatron_fp32_router.lab import checkpoint, kernels
from megatron_fp32_router.optimizers.distributed import mapping, reading

FIELDS: dict[str, Any] = {**resume.TINY, "optimizer": "distributed", "fused_adam": True, "expert_bias": False}
BY_BUFFER = ("torch", "dp_zero_gather_scatter", "dp_reshardable")


def recipe_of(**fields: Any) -> Any:
    return lab.Recipe(**{**FIELDS, **fields})


@pytest.fixture(autouse=True)
def off_at_the_end() -> Any:
    yield
    resume.turn("off")


# Layouts -------------------------------------------------------------------------------------------------------------


def with_names(room: lab.Lab, layouts: list[mapping.Layout]) -> list[Any]:
    names = {parameter: name for chunk in room.chunks for name, parameter in chunk.named_parameters()}
    return [
        [
            (
                buffer.dtypes,
                [(bucket.numel, {names[p]: at for p, at in bucket.starts.items()}) for bucket in buffer.buckets],
            )
            for buffer in layout
        ]
        for layout in layouts
    ]


def built(recipe: Any, plugin: str, shared: bool) -> Any:
    """A model and its optimizers; `shared`: with an embedding that the last pipeline stage has too."""
    resume.turn(plugin)
    lab.seed(recipe.seed)
    chunks = lab.build_model(recipe)
    if shared:
        chunks[0].embedding.word_embeddings.weight.shared_embedding = True
    return lab.wrap(recipe, chunks)


@pytest.mark.on_lines("0.11", "0.13", "0.19")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "ddp", [{}, {"bucket_size": 3000}, {"grad_reduce_in_fp32": False, "bucket_size": 5000}, {"busbw": True}]
)
def test_the_buffers_of_the_other_setting_are_those_that_a_run_with_it_has(
    ddp: dict[str, Any], shared: bool, release: Version
) -> None:
    if ddp.get("busbw"):
        if release < Version("0.12"):
            return  # 0.11 has no such padding
        ddp = {"pad_buckets_for_high_nccl_busbw": True, "bucket_size": 3000}
    recipe = recipe_of(ddp_extra=ddp, linear_bias=release >= Version("0.15"))
    with lab.parallel(recipe):
        found = {}
        for plugin in ("off", "buffers", "on"):
            room = built(recipe, plugin, shared)
            optimizers = checkpoint.optimizers(room)
            found[plugin] = with_names(room, [mapping.present(one) for one in optimizers])
            if plugin != "off":
                found[f"{plugin}, other"] = with_names(room, [mapping.other(one) or () for one in optimizers])
    assert found["off"] == found["buffers"] != found["on"]
    assert found["on, other"] == found["off"]
    assert found["buffers, other"] == found["on"]


@pytest.mark.on_lines("0.19")
def test_frozen_routers_lie_in_no_buffer_and_nothing_is_computed_for_them() -> None:
    recipe = recipe_of()
    with lab.parallel(recipe):
        resume.turn("on")
        lab.seed(recipe.seed)
        chunks = lab.build_model(recipe)
        for name, parameter in chunks[0].named_parameters():
            parameter.requires_grad_("router" not in name)
        for optimizer in checkpoint.optimizers(lab.wrap(recipe, chunks)):
            assert mapping.flipped(optimizer) == {}
            assert mapping.other(optimizer) == mapping.present(optimizer)


# Checkpoints ----------------------------------------------------------------------------------------------------------


def saved(recipe: Any, plugin: str, folder: Path, formats: list[str]) -> Any:
    """Three steps with the plugin so, saved in those of `formats` that can be saved."""
    resume.turn(plugin)
    room = resume.build(recipe)
    resume.train(room, 0)
    folder.mkdir(exist_ok=True)
    resume.keep(room, folder, checkpoint.snapshot(room))
    for name in formats:
        checkpoint.save(room, folder / name, name)
    return room


def assert_goes_on(recipe: Any, home: Path, folder: Path, name: str, plugin: str) -> Any:
    """What `folder` holds, loaded with the plugin so, is what `home` kept, put in by hand, and ends alike."""
    resume.turn(plugin)
    truth = resume.transplanted(recipe, home)
    room = resume.build(recipe)
    checkpoint.load(room, folder / name, name)
    assert checkpoint.differences(truth["middle"], checkpoint.snapshot(room)) == [], (name, plugin)
    assert resume.train(room, resume.STEPS) == truth["losses"]
    assert checkpoint.differences(truth["end"], checkpoint.snapshot(room)) == [], (name, plugin)
    return room


def test_a_run_without_the_plugin_resumes_from_one_with_it_through_protect_buffers(
    resume_record: Any, tmp_path: Path
) -> None:
    recipe = recipe_of(ddp_extra={"bucket_size": 3000})
    formats = [name for name in checkpoint.formats("distributed") if name in BY_BUFFER]
    with lab.parallel(recipe):
        saved(recipe, "on", tmp_path / "on", formats)
        for name in formats:
            # Nobody of ours is there to read it.
            resume.turn("off")
            other = resume.build(recipe)
            failure = resume.attempt(
                lambda other=other, name=name: checkpoint.load(other, tmp_path / "on" / name, name)
            )
            assert failure
            assert not failure.startswith("CheckpointRefusedError"), name
            resume_record("DistributedOptimizer", name, "on->off", "upstream refuses")
            # It is read, and saved at once, by a run that leaves weights to Megatron.
            resume.turn("buffers")
            between = resume.build(recipe)
            checkpoint.load(between, tmp_path / "on" / name, name)
            checkpoint.save(between, tmp_path / "buffers" / name, name)
            assert_goes_on(recipe, tmp_path / "on", tmp_path / "buffers", name, "off")
            # And turned on again it is as if nothing had been.
            resume.turn("on")
            again = resume.build(recipe)
            checkpoint.load(again, tmp_path / "buffers" / name, name)
            assert resume.differences_from_whole(again, tmp_path / "on") == []


@pytest.mark.on_lines("0.11", "0.19")
def test_a_load_that_was_interrupted_leaves_the_checkpoint_as_it_was_and_can_be_done_again(tmp_path: Path) -> None:
    recipe = recipe_of()
    formats = [name for name in checkpoint.formats("distributed") if name in BY_BUFFER[1:]]
    with lab.parallel(recipe):
        saved(recipe, "off", tmp_path, formats)
        files = resume.content(tmp_path)
        for name in formats:
            resume.turn("on")
            room = resume.build(recipe)
            broken = mock.patch.object(FileSystemReader, "read_data", side_effect=OSError("the disk is gone"))
            with broken as reading_files:
                failure = resume.attempt(lambda room=room, name=name: checkpoint.load(room, tmp_path / name, name))
            assert reading_files.called
            assert "the disk is gone" in failure
            assert resume.content(tmp_path) == files
            assert_goes_on(recipe, tmp_path, tmp_path, name, "on")
        assert resume.content(tmp_path) == files


@pytest.mark.on_lines("0.19")
def test_a_gated_mlp_whose_halves_are_stored_apart_does_not_disturb_a_load(tmp_path: Path) -> None:
    recipe = recipe_of(extra={"gated_linear_unit": True})
    formats = ["dp_reshardable", "fully_reshardable"]
    with lab.parallel(recipe):
        saved(recipe, "off", tmp_path, formats)
        for name in formats:
            assert_goes_on(recipe, tmp_path, tmp_path, name, "on")


@pytest.mark.on_lines("0.19")
def test_a_main_copy_is_not_read_into_the_memory_of_the_weight_into_which_the_rounded_one_is_read(
    tmp_path: Path,
) -> None:
    """Distributed checkpoints are read in place, in whatever order."""
    recipe = recipe_of()
    with lab.parallel(recipe):
        saved(recipe, "off", tmp_path, ["dp_reshardable"])
        resume.turn("on")
        room = resume.build(recipe)
        with checkpoint._step_kept_in_groups(room):
            state = checkpoint._sharded_state(room, "dp_reshardable", loading=True)
        load = import_module("megatron.core.dist_checkpointing.serialization").load_tensors_metadata
        plan = reading.plan(state, lambda: load(str(tmp_path / "dp_reshardable")), lambda *_: "they do not fit")
    moved = [request for request in plan.changes.values() if isinstance(request, mapping.Request)]
    asked = [(parameter, entry["param"].data) for request in moved for _, parameter, _, entry in request.slices()]
    routers = {id(router.weight) for _, router in room.routers()}
    assert routers <= {id(parameter) for parameter, _ in asked}
    for parameter, main in asked:
        assert main.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr()


@pytest.mark.on_lines("0.11", "0.19")
def test_without_the_plugins_reading_upstream_stops_with_an_error_of_its_own(tmp_path: Path) -> None:
    recipe = recipe_of()
    formats = [name for name in checkpoint.formats("distributed") if name in BY_BUFFER]
    with lab.parallel(recipe):
        saved(recipe, "off", tmp_path, formats)
        for name in formats:
            with unrepaired.only_casts():
                other = resume.build(recipe)
                failure = resume.attempt(lambda other=other, name=name: checkpoint.load(other, tmp_path / name, name))
            assert failure, name


@pytest.mark.on_lines("0.11", "0.19")
def test_where_megatron_lays_buffers_out_in_a_new_way_a_load_is_refused_and_a_user_can_choose_to_meet_upstream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    recipe = recipe_of()
    name = next(name for name in checkpoint.formats("distributed")[::-1] if name in BY_BUFFER)
    with lab.parallel(recipe):
        saved(recipe, "off", tmp_path, [name])
        monkeypatch.setattr(mapping, "_START", 256)
        failures = []
        choices: tuple[Any, ...] = ("raise", "warn")
        for choice in choices:
            resume.turn("off")
            megatron_fp32_router.enable(on_mismatch=choice)
            room = resume.build(recipe)
            failures.append(resume.attempt(lambda room=room: checkpoint.load(room, tmp_path / name, name)))
    flags = "fully_reshardable" if "fully_reshardable" in checkpoint.formats("distributed") else "model_space"
    for part in ("CheckpointRefusedError", "in a way that the plugin does not know", "--no-load-optim", flags):
        assert part in failures[0]
    assert failures[1]
    assert "CheckpointRefusedError" not in failures[1]
    assert any("in a way that the plugin does not know" in record.getMessage() for record in caplog.records)


@pytest.mark.on_lines("0.19")
def test_the_gathered_format_from_before_february_2024_is_left_to_megatron(plugin: Any) -> None:
    """Its buffers are lists of buckets, under one dtype: nothing that could be compared with this run's."""
    recipe = recipe_of()
    with lab.parallel(recipe):
        room, other = resume.build(recipe), resume.build(recipe)
        resume.train(room, 0)
        resume.train(other, 0)
        resume.train(other, resume.STEPS)
        for one, two in zip(checkpoint.optimizers(room), checkpoint.optimizers(other), strict=True):
            state = one.get_parameter_state_dp_zero()
            old = {
                index: {torch.float32: {key: [value] for key, value in tensors.items() if key != "numel_unpadded"}}
                for index in range(len(one.buffers))
                for tensors in state[index].values()
            }
            two.load_parameter_state_from_dp_zero(old, update_legacy_format=True)
        expected, found = checkpoint.snapshot(room), checkpoint.snapshot(other)
        wrong = checkpoint.differences(expected, found)
    assert not [name for name in wrong if name.endswith((".main", ".exp_avg", ".exp_avg_sq"))]


# Remainders -----------------------------------------------------------------------------------------------------------


@pytest.mark.on_lines("0.19")
def test_a_main_copy_and_its_two_halves_are_the_same_number_for_fused_adam_too() -> None:
    bits = np.random.default_rng(3).integers(0, 2**32, 4096, dtype=np.uint32)
    bits[:8] = [0x3F808000, 0x3F818000, 0xBF808000, 0x3F807FFF, 0x3F808001, 0x3F80FFFF, 0, 0x80000000]
    bits = bits[np.isfinite(bits.view(np.float32))]
    main = torch.from_numpy(bits.view(np.float32).copy())
    weight, rest = reading.split(main)
    assert weight.dtype == torch.bfloat16
    assert torch.equal(reading.join(weight.float(), rest).view(torch.int32), main.view(torch.int32))
    # By FusedAdam's arithmetic: a step that moves nothing leaves both halves as they are.
    nothing = torch.zeros(main.shape)
    lists = [[nothing], [weight.clone()], [nothing.clone()], [nothing.clone()], [rest.clone()]]
    kernels.adam_param_remainder(0, torch.zeros(1, dtype=torch.int), lists, 0.0, 0.9, 0.999, 1e-8, 1, 1, 1, 0.0)
    finite = weight.isfinite() & (main != 0)
    assert torch.equal(lists[1][0][finite], weight[finite])
    assert torch.equal(lists[4][0][finite], rest[finite])
