"""Optimizers and their checkpoints with fp32 router parameters, on one rank: what upstream gets wrong, and refusals."""

from __future__ import annotations

import copy
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from programs import resume, unrepaired

import megatron_fp32_router
from megatron_fp32_router import lab
from megatron_fp32_router.lab import checkpoint
from megatron_fp32_router.patching.registry import registry

DISTRIBUTED: dict[str, Any] = {"optimizer": "distributed", "fused_adam": True}
CLASSES = {"distributed": "DistributedOptimizer", "plain": "Float16OptimizerWithFloat16Params"}


def recipe_of(kind: str, **fields: Any) -> Any:
    # Without the plugin a load rounds expert_bias, in the releases in which it does (see the defects D4 and D5).
    distributed = DISTRIBUTED if kind == "distributed" else {}
    return lab.Recipe(**{**resume.TINY, **distributed, "expert_bias": False, **fields})


def status(name: str) -> Any:
    return next(record for record in megatron_fp32_router.status() if record.id == name)


def resumes(recipe: Any, name: str, folder: Path, *, then: Any = None) -> tuple[str, list[str]]:
    """Save after three steps, load into a new model: (what was raised, what differs). `then`: called in between."""
    room = resume.build(recipe)
    resume.train(room, 0)
    failure = resume.attempt(lambda: checkpoint.save(room, folder, name))
    if failure:
        return failure, []
    if then is not None:
        then()
    other = resume.build(recipe)
    before = checkpoint.snapshot(other)
    failure = resume.attempt(lambda: checkpoint.load(other, folder, name))
    after = checkpoint.snapshot(other)
    if failure:
        return failure, [changed for changed in checkpoint.differences(before, after) if changed in before]
    return "", checkpoint.differences(checkpoint.snapshot(room), after)


@pytest.mark.parametrize("kind", list(CLASSES))
def test_without_the_repairs_no_format_resumes_and_with_them_each_does_that_upstream_has(
    kind: str, resume_record: Any, tmp_path: Path
) -> None:
    recipe = recipe_of(kind)
    with lab.parallel(recipe):
        for name in checkpoint.formats(kind):
            resume.turn("off")
            upstream = resumes(recipe, name, tmp_path / f"{name} off")
            resume.turn("on")
            repaired = resumes(recipe, name, tmp_path / f"{name} on")
            with unrepaired.only_casts():
                broken = resumes(recipe, name, tmp_path / f"{name} unrepaired")
            if upstream[0]:
                # This format fails in this release whatever the plugin does, and in the same way.
                assert repaired[0].partition(":")[0] == upstream[0].partition(":")[0], (name, upstream, repaired)
                for direction in ("on->on", "off->on", "on->off"):
                    resume_record(CLASSES[kind], name, direction, "upstream refuses")
                continue
            assert upstream == repaired == ("", []), name
            # The plain optimizer's legacy files are wrong across on and off only: see the next test.
            assert (broken == ("", [])) == ((kind, name) == ("plain", "torch")), f"{name}: {broken}"
    resume.turn("off")


def test_without_the_repair_the_plain_optimizer_takes_its_neighbours_main_copies_from_a_run_without_the_plugin(
    tmp_path: Path,
) -> None:
    recipe = recipe_of("plain")
    with lab.parallel(recipe):
        resume.turn("off")
        room = resume.build(recipe)
        resume.train(room, 0)
        checkpoint.save(room, tmp_path, "torch")
        expected = checkpoint.snapshot(room)
        with unrepaired.only_casts():
            other = resume.build(recipe)
            failure = resume.attempt(lambda: checkpoint.load(other, tmp_path, "torch"))
            found = checkpoint.snapshot(other)
        wrong = [name for name in checkpoint.differences(expected, found) if name.endswith(".main")]
    # Copied into a neighbour of another shape, or, where shapes agree, not noticed at all.
    assert failure or wrong


def test_a_save_that_upstream_fills_from_the_wrong_places_is_refused(release: Version, tmp_path: Path) -> None:
    """Padding between buckets, and the format fully_reshardable: silently wrong upstream, whatever the router is."""
    name = "fully_reshardable"
    if name not in checkpoint.formats("distributed"):
        return  # before 0.15 there is no such format
    padded = {"bucket_size": 3000, "pad_buckets_for_high_nccl_busbw": True}
    recipe = recipe_of("distributed", ddp_extra=padded)
    with lab.parallel(recipe):
        resume.turn("off")
        failure, wrong = resumes(recipe, name, tmp_path / "off")
        assert not failure
        resume.turn("on")
        refusal = resumes(recipe, name, tmp_path / "on")
        resume.turn("off")
    if wrong:
        assert any(changed.endswith("exp_avg") for changed in wrong)
        assert refusal[0].startswith("CheckpointRefusedError")
        assert "--ddp-bucket-size" in refusal[0]
        assert "#5077" in refusal[0]
    else:
        assert release >= Version("0.20"), "repaired by #5077"
        assert refusal == ("", [])


@pytest.mark.parametrize("kind", list(CLASSES))
def test_while_loading_an_fp32_weight_and_its_main_copy_are_read_into_different_memory(kind: str, plugin: Any) -> None:
    """Distributed checkpoints are read in place, in whatever order: the model's entry may be the rounded one."""
    recipe = recipe_of(kind)
    with lab.parallel(recipe):
        room = resume.build(recipe)
        weights = {router.weight.untyped_storage().data_ptr() for _, router in room.routers()}
        for name in checkpoint.formats(kind):
            if name not in ("torch_dist", "fully_sharded_model_space"):
                continue
            state: dict[str, Any] = {}
            with checkpoint._step_kept_in_groups(room):
                failure = resume.attempt(
                    lambda name=name, state=state: state.update(checkpoint._sharded_state(room, name, loading=True))
                )
            if failure:
                assert "flattened_range is not supported" in failure  # newer releases, whatever the plugin does
                continue
            found = {
                entry.data.untyped_storage().data_ptr()
                for entry in entries(state["optimizer"])
                if "fp32_param" in entry.key and entry.key.endswith("router.weight")
            }
            assert found
            assert not found & weights


def entries(value: Any) -> list[Any]:
    """Everything with a key in a sharded state dict."""
    if isinstance(value, dict | list | tuple):
        return [e for item in (value.values() if isinstance(value, dict) else value) for e in entries(item)]
    return [value] if hasattr(value, "key") and hasattr(value, "data") else []


def distributed_optimizer(room: Any) -> Any:
    """The one that holds the routers' parameters."""
    routers = {id(p) for _, router in room.routers() for p in router.parameters()}
    return next(
        one for one in checkpoint.optimizers(room) if any(id(p) in routers for p in one.model_param_group_index_map)
    )


@pytest.mark.parametrize("entry", ["sharded_state_dict", "get_parameter_state_dp_zero"])
def test_an_optimizer_that_was_built_before_the_plugin_was_on_is_neither_saved_nor_loaded(entry: str) -> None:
    recipe = recipe_of("distributed")
    with lab.parallel(recipe):
        with unrepaired.only_casts():
            optimizer = distributed_optimizer(resume.build(recipe))
        resume.turn("on")
        with pytest.raises(megatron_fp32_router.CheckpointRefusedError, match="before the optimizer is built"):
            getattr(optimizer, entry)(*([{}] if entry == "sharded_state_dict" else []))
    resume.turn("off")


def test_buffers_mode_and_fp32_training_leave_the_distributed_optimizer_as_it_is(plugin: Any) -> None:
    for protect, precision in (("buffers", "bf16"), ("all", "fp32")):
        plugin(protect=protect)
        recipe = recipe_of("distributed", precision=precision)
        with lab.parallel(recipe):
            for optimizer in checkpoint.optimizers(resume.build(recipe)):
                shards = [shard for group in optimizer.shard_fp32_groups for shard in group]
                # In fp32 training upstream's shards are views that require gradients, and stay so.
                assert all(not shard.is_leaf for shard in shards)
                assert bool(shards) == (precision == "fp32")
                # The numbering is upstream's own: along the gradient buffers, group by group.
                counts: dict[int, int] = {}
                for buffer in optimizer.gbuf_ranges:
                    for buckets in buffer.values():
                        for parameter in [parameter for bucket in buckets for parameter in bucket["param_map"]]:
                            group, place = optimizer.model_param_group_index_map[parameter]
                            assert place == counts.setdefault(group, 0)
                            counts[group] += 1
        assert status("optimizer-mixed-groups").state == "applied"


def test_a_megatron_that_has_the_repair_is_reported_as_native(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As #5835 does it: the map is made anew from the groups, and fp32 shards are detached."""
    recipe = recipe_of("distributed")
    with lab.parallel(recipe):
        resume.build(recipe)
        assert status("optimizer-mixed-groups").state == "applied"
        megatron_fp32_router.disable()
        home = import_module("megatron.core.optimizer.distrib_optimizer").DistributedOptimizer
        build, construct = home._build_model_and_main_param_groups.__func__, home.__init__

        def detached(cls: Any, ranges: Any, buffers: Any, group_ranges: Any, config: Any) -> Any:
            groups = build(cls, ranges, buffers, group_ranges, config)
            for shards, group in zip(groups[3], group_ranges, strict=True):
                shards[:] = [shard.detach() for shard in shards]
                group["orig_group"]["params"][: len(shards)] = shards
            return groups

        def __init__(self: Any, optimizer: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            construct(self, optimizer, config, *args, **kwargs)
            for index, (fp32, other) in enumerate(zip(self.model_fp32_groups, self.model_float16_groups, strict=True)):
                for place, parameter in enumerate([*fp32, *other]):
                    self.model_param_group_index_map[parameter] = (index, place)

        monkeypatch.setattr(home, "_build_model_and_main_param_groups", classmethod(detached))
        monkeypatch.setattr(home, "__init__", __init__)
        megatron_fp32_router.enable()
        resume.build(recipe)
        assert status("optimizer-mixed-groups").state == "native"
        assert "5835" in status("optimizer-mixed-groups").detail
    megatron_fp32_router.disable()


def test_main_copies_that_fit_neither_layout_are_refused_before_anything_is_overwritten(plugin: Any) -> None:
    recipe = recipe_of("plain")
    with lab.parallel(recipe):
        room = resume.build(recipe)
        resume.train(room, 0)
        optimizer = next(one for one in checkpoint.optimizers(room) if any(one.fp32_from_fp32_groups))
        state = copy.deepcopy(optimizer.state_dict())
        saved = [list(group) for group in state["fp32_from_fp16_params"]]
        before = checkpoint.snapshot(room)
        state["fp32_from_fp16_params"] = [group[:-1] for group in saved]
        with pytest.raises(megatron_fp32_router.CheckpointRefusedError, match="--no-load-optim"):
            optimizer.load_state_dict(state)
        assert checkpoint.differences(before, checkpoint.snapshot(room)) == []
        # A Megatron that leaves native fp32 parameters out of the list is understood too.
        mains = {id(main) for group in optimizer.fp32_from_float16_groups for main in group}
        native = [[main for main in group if id(main) in mains] for group in live_lists(optimizer)]
        state["fp32_from_fp16_params"] = native
        optimizer.load_state_dict(copy.deepcopy(state))
        assert checkpoint.differences(before, checkpoint.snapshot(room)) == []


def live_lists(optimizer: Any) -> list[list[Any]]:
    return [list(group["params"]) for group in optimizer.optimizer.param_groups]


def test_a_chunk_without_buckets_has_a_bucket_group_for_each_dtype(plugin: Any) -> None:
    recipe = recipe_of("distributed")
    with lab.parallel(recipe):
        for repaired in (False, True):
            if repaired:
                resume.turn("on")
                chunk = unbucketed(recipe)
            else:
                with unrepaired.only_casts():
                    chunk = unbucketed(recipe)
            mixed = [
                group
                for group in chunk.bucket_groups
                if len({parameter.dtype for bucket in group.buckets for parameter in bucket.params}) > 1
            ]
            assert bool(mixed) != repaired
    assert registry.replacements["bucket-groups"]
    assert "megatron.core.distributed.distributed_data_parallel" in sys.modules


def unbucketed(recipe: Any) -> Any:
    """A chunk as the later ones of a virtual pipeline are wrapped."""
    from megatron_fp32_router.lab import train

    lab.seed(recipe.seed)
    model = lab.build_model(recipe)[0]
    return train._wrap(recipe, model.config, model, 1)
