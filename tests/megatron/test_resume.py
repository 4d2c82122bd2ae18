"""Save, and go on in a new process: the bits of a run that never stopped, in every format that this Megatron has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bootstrap import NEWEST
from packaging.version import Version
from programs import resume

from megatron_fp32_router import lab
from megatron_fp32_router.lab import checkpoint

pytestmark = pytest.mark.whole

DISTRIBUTED: dict[str, Any] = {"optimizer": "distributed", "fused_adam": True}
CLASSES = {"distributed": "DistributedOptimizer", "plain": "Float16OptimizerWithFloat16Params"}
#: Formats that store optimizer state by parameter name, so that it fits whatever the dtypes are.
BY_NAME = ("torch_dist", "fully_sharded_model_space", "fully_reshardable")
#: Several buckets, some of which end in padding. (A format by name loses state there: see the plugin's refusal.)
BUCKETS: dict[str, Any] = {"ddp_extra": {"bucket_size": 3000}}
#: Without the plugin a load rounds expert_bias, in the releases in which it does (see the defects D4 and D5).
NO_BIAS: dict[str, Any] = {"expert_bias": False}
#: The oldest release, the newest, and the one whose checkpoint formats are new: 0.15 replaced bucket space.
FULL = ("0.11", "0.15", "0.19")


@pytest.fixture(scope="module")
def usable(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Optimizer -> the formats in which this Megatron can save and load without the plugin at all."""
    failures = {kind: upstream_failures(kind, tmp_path_factory.mktemp("upstream")) for kind in CLASSES}
    return {kind: [name for name, failure in found.items() if not failure] for kind, found in failures.items()}


def upstream_failures(kind: str, folder: Path) -> dict[str, str]:
    """Format -> why it cannot be saved and loaded, or "", with the plugin off and one rank."""
    recipe = lab.Recipe(**resume.TINY, **NO_BIAS, **(DISTRIBUTED if kind == "distributed" else {}))
    resume.turn("off")
    found = {}
    with lab.parallel(recipe):
        room = resume.build(recipe)
        resume.train(room, 0)
        for name in checkpoint.formats(kind):
            found[name] = resume.attempt(lambda name=name: checkpoint.save(room, folder / name, name))
            if not found[name]:
                other = resume.build(recipe)
                found[name] = resume.attempt(lambda name=name, other=other: checkpoint.load(other, folder / name, name))
                assert found[name] or not checkpoint.differences(checkpoint.snapshot(room), checkpoint.snapshot(other))
    return found


def case(name: str, formats: list[str], plugin: str, then: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "formats": formats, "plugin": plugin, "then": then, "fields": fields}


def cases(usable: dict[str, list[str]], release: Version) -> list[dict[str, Any]]:
    """All that two ranks go through, one after the other."""
    all_of_them, plain = usable["distributed"], usable["plain"]
    by_name = [name for name in all_of_them if name in BY_NAME]
    by_buffer = [name for name in all_of_them if name not in BY_NAME]
    biases = {"linear_bias": release >= Version("0.15")}
    some = [
        case("DP=2", all_of_them, "on", "on", data_parallel=2, **biases, **DISTRIBUTED),
        case("DP=2, plain", plain, "on", "on", data_parallel=2, **biases),
        # Without overlap nothing but the plugin gathers what was loaded before the next forward.
        case("DP=2, off", all_of_them, "off", "on", data_parallel=2, overlap=False, **DISTRIBUTED, **NO_BIAS, **biases),
        case("DP=2, off, plain", plain, "off", "on", data_parallel=2, **NO_BIAS, **biases),
        case("DP=2, on", by_name, "on", "off", data_parallel=2, **DISTRIBUTED, **NO_BIAS),
        case("DP=2, on, plain", plain, "on", "off", data_parallel=2, **NO_BIAS, **biases),
    ]
    if f"{release.major}.{release.minor}" in FULL:
        # The two that Megatron's own flags choose between.
        few = all_of_them[-2:]
        rough = {"overlap": False, "ddp_extra": {"grad_reduce_in_fp32": False}}
        some += [
            case("DP=2, no overlap, bf16 gradients", few, "on", "on", data_parallel=2, **rough, **DISTRIBUTED),
            case("TP=2", few, "on", "on", tensor_parallel=2, **DISTRIBUTED),
            case("PP=2", few, "on", "on", pipeline_parallel=2, **DISTRIBUTED),
            case("TP=2, plain", plain[-1:], "on", "on", tensor_parallel=2),
            case("VPP=2, plain", plain[-1:], "on", "on", pipeline_parallel=2, virtual_pipeline=2, layers=4, **rough),
            case("EP=2", few, "on", "on", data_parallel=2, expert_parallel=2, **DISTRIBUTED),
            case("buckets, off", by_buffer, "off", "on", data_parallel=2, **BUCKETS, **DISTRIBUTED, **NO_BIAS),
            case("buckets, on", by_buffer, "on", "buffers", data_parallel=2, **BUCKETS, **DISTRIBUTED, **NO_BIAS),
        ]
    if str(release) == NEWEST:
        last = {**DISTRIBUTED, **NO_BIAS, "layers": 4}
        some += [
            case("VPP=2, off", by_buffer, "off", "on", pipeline_parallel=2, virtual_pipeline=2, **last),
            case("TP=2, off", by_buffer[-1:], "off", "on", tensor_parallel=2, **last),
            case("EP=2, off", by_buffer[-1:], "off", "on", data_parallel=2, expert_parallel=2, **last),
        ]
    if release >= Version("0.19"):  # where Megatron calls GPTModel deprecated
        model: dict[str, Any] = {"model": "hybrid", "mtp": 1}
        some += [
            case("hybrid, DP=2", all_of_them, "on", "on", data_parallel=2, **model, **DISTRIBUTED),
            case("hybrid, EP=2", few, "on", "on", data_parallel=2, expert_parallel=2, **model, **DISTRIBUTED),
            case("hybrid, VPP=2, plain", plain, "on", "on", **model, pipeline_parallel=2, virtual_pipeline=2, layers=4),
            case("hybrid, off, plain", plain, "off", "on", data_parallel=2, **model, **NO_BIAS),
            case("hybrid, on", by_name, "on", "off", data_parallel=2, **model, **DISTRIBUTED, **NO_BIAS),
        ]
    some.append(case("VPP=2", by_name, "on", "on", pipeline_parallel=2, virtual_pipeline=2, layers=4, **DISTRIBUTED))
    return some


def test_a_resume_in_a_new_process_ends_on_the_bits_of_a_run_that_never_stopped(
    usable: Any, release: Version, request: pytest.FixtureRequest, resume_record: Any, tmp_path: Path
) -> None:
    wanted = cases(usable, release)
    where = {
        "megatron": request.config.getoption("--megatron"),
        "plugin": True,
        "python_path": [str(request.config.rootpath / "tests" / "programs")],
        "timeout": 400.0,
    }
    two = lab.Recipe(data_parallel=2)
    for rank in lab.run_ranks("resume:write", two, {"cases": wanted, "folder": str(tmp_path)}, **where):
        for name, result in rank.items():
            assert result["disturbed"] == [], f"{name}: saving changed the training"
            assert result["losses"][-1] < result["losses"][0], f"{name} does not learn"
            assert set(result["failures"].values()) <= {""}, (name, result["failures"])
    # State that is stored by name fits other tensor-parallel ranks too.
    by_name = [name for name in usable["distributed"] if name in BY_NAME]
    write_alone(tmp_path / "TP=1", by_name)
    fields = {**NO_BIAS, **DISTRIBUTED, "tensor_parallel": 2}
    cut = [{"name": name, "formats": by_name, "then": "on", "fields": fields} for name in ("TP=1", "DP=2, on")]
    reading = {"cases": wanted, "resharded": cut, "folder": str(tmp_path)}
    ranks = lab.run_ranks("resume:read", two, reading, **where)
    for rank in ranks:
        assert rank["resharded"] == [{name: [] for name in by_name}] * 2, "TP=1 -> TP=2, DP=2 -> TP=2"
    for one in wanted:
        for name in one["formats"]:
            for number, rank in enumerate(ranks):
                found = rank[f"{one['name']} {one['then']}"][name]
                good = {"failure": "", "loaded": [], "end": [], "losses": True}
                assert found == good, f"{one['name']}, {name}, rank {number}: {one['plugin']}->{one['then']}"
            kind = one["fields"].get("optimizer", "plain")
            if one["then"] != "buffers":
                resume_record(CLASSES[kind], name, f"{one['plugin']}->{one['then']}", "works")
    resharded(tmp_path, wanted)


def write_alone(home: Path, formats: list[str]) -> None:
    """Three steps of one rank, saved in every one of `formats`."""
    home.mkdir()
    recipe = lab.Recipe(**resume.TINY, **NO_BIAS, **DISTRIBUTED)
    resume.turn("on")
    with lab.parallel(recipe):
        room = resume.build(recipe)
        resume.train(room, 0)
        resume.keep(room, home, checkpoint.snapshot(room))
        for name in formats:
            checkpoint.save(room, home / name, name)
    resume.turn("off")


def resharded(folder: Path, written: list[dict[str, Any]]) -> None:
    """DP=2 -> DP=1 in every format, TP=2 -> TP=1 where names decide: the same state, in other slices."""
    for one in written:
        if one["name"] not in ("DP=2", "DP=2, off", "TP=2"):
            continue
        fields = {**one["fields"], "data_parallel": 1, "tensor_parallel": 1}
        recipe = lab.Recipe(**{**resume.TINY, **fields})
        resume.turn("on")
        with lab.parallel(recipe):
            for name in one["formats"]:
                if one["name"] != "TP=2" or name in BY_NAME:
                    room = resume.build(recipe)
                    checkpoint.load(room, folder / one["name"] / name, name)
                    assert resume.differences_from_whole(room, folder / one["name"]) == [], (one["name"], name)
    resume.turn("off")


@pytest.mark.on_lines("0.19")
def test_a_rank_whose_buffers_fit_neither_setting_stops_all_before_anything_is_read(
    usable: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    two = {"DP=2": {"data_parallel": 2}, "PP=2": {"pipeline_parallel": 2}}
    # Only the first pipeline stage has several buckets; what is gathered is looked at in each data-parallel group.
    wanted = [
        {"name": f"{layout} {name}", "format": name, "fields": {**fields, **DISTRIBUTED, **NO_BIAS}}
        for name in usable["distributed"]
        for layout, fields in two.items()
        if name not in BY_NAME and (name == "dp_reshardable") == (layout == "PP=2")
    ]
    found = lab.run_ranks(
        "resume:refuse",
        lab.Recipe(data_parallel=2),
        {"cases": wanted, "folder": str(tmp_path)},
        megatron=request.config.getoption("--megatron"),
        plugin=True,
        python_path=[str(request.config.rootpath / "tests" / "programs")],
        timeout=200.0,
    )
    for number, one in enumerate(wanted):
        for rank in found:
            failure = rank[number]["failure"]
            assert failure.startswith("CheckpointRefusedError"), (one["name"], failure)
            for part in ("Found: gbuf_idx_0.", "Expected: gbuf_idx_0.", "other setting: ", "--ddp-bucket-size"):
                assert part in failure, (one["name"], failure)
            assert ("On rank 0: " in failure) == (one["format"] == "dp_reshardable")
            assert rank[number]["untouched"]
            # Megatron loads legacy files in parts, and what is gathered after the model.
            if one["format"] == "dp_reshardable":
                assert rank[number]["changed"] == []
            assert not [name for name in rank[number]["changed"] if "exp_avg" in name]
