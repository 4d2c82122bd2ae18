"""The precision-aware optimizer, with TransformerEngine's own FusedAdam: updates, checkpoints, warnings."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bootstrap import NEWEST, ensure_transformer_engine
from packaging.version import Version
from programs import resume, unrepaired
from programs.precision_aware import inner_of, resumed

from megatron_fp32_router import lab, log
from megatron_fp32_router.lab import checkpoint, cpu, kernels

F32, BF16, F16, FP8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8
BF16_MOMENTS = {"exp_avg_dtype": BF16, "exp_avg_sq_dtype": BF16}
#: name -> (remainders, dtypes). Named ones are recipes of Megatron-Bridge.
KINDS: dict[str, tuple[bool, dict[str, torch.dtype]]] = {
    "all fp32": (False, {}),
    "remainders": (True, {}),
    "DeepSeek-V3 and Moonlight: bf16 gradients and moments": (True, {"main_grads_dtype": BF16, **BF16_MOMENTS}),
    "DeepSeek-V3 benchmarks: bf16 moments": (True, BF16_MOMENTS),
    "fp16 main copies, bf16 gradients": (False, {"main_params_dtype": F16, "main_grads_dtype": BF16}),
}
OFFLOAD: dict[str, Any] = {
    "optimizer_cpu_offload": True,
    "optimizer_offload_fraction": 1.0,
    "pin_cpu_grads": False,
}
ROW = {False: "DistributedOptimizer, precision-aware", True: "DistributedOptimizer, precision-aware, remainders"}
BY_NAME = ("fully_sharded_model_space", "fully_reshardable")


@pytest.fixture
def case(release: Version) -> Callable[..., dict[str, Any]]:
    """`case(name, remainders, dtypes, **recipe)`: as programs/resume.py takes it."""

    def make(name: str, remainders: bool, dtypes: dict[str, Any], **fields: Any) -> dict[str, Any]:
        if release < Version("0.13"):
            # Always with remainders, where TransformerEngine has them.
            more, version = {}, "" if remainders else "2.0"
        else:
            more, version = {"store_param_remainders": remainders}, ""
        fields = {
            "expert_bias": False,
            "optimizer": "distributed",
            "optimizer_extra": {"use_precision_aware_optimizer": True, **more, **dtypes},
            "ddp_extra": {"grad_reduce_in_fp32": dtypes.get("main_grads_dtype", F32) == F32},
            **fields,
        }
        engine = (str(ensure_transformer_engine()), version)
        return {"name": name, "fields": fields, "engine": engine, "plugin": "on", "then": "on", "formats": []}

    return make


# Updates ---------------------------------------------------------------------------------------------------------


@pytest.mark.on_lines("0.11", "0.14", "0.19")
@pytest.mark.parametrize("kind", KINDS)
def test_a_router_weight_moves_as_the_kernel_moves_one_fp32_parameter(kind: str, case: Any, plugin: Any) -> None:
    remainders, dtypes = KINDS[kind]
    this = case(kind, remainders, dtypes, overlap=False, clip_grad=1e-2)
    recipe = resume.recipe_of(this)
    with lab.parallel(recipe), resume.engine(this):
        room = resume.build(recipe)
        _, router = room.routers()[0]
        _, held, inner = inner_of(room, router)
        assert held.data_ptr() == router.weight.data_ptr()
        gradients: list[torch.Tensor] = []
        inner.register_step_pre_hook(lambda *_: gradients.append(held.decoupled_grad.clone()))
        start = router.weight.detach().flatten().clone()
        found = []
        batches = lab.text_batches(recipe, seed=7)
        for _ in range(resume.STEPS):
            room.step(batches)
            found.append(router.weight.detach().flatten().clone())
        reduced = {p.main_grad.dtype for p in room.chunks[0].parameters()}
        assert reduced == {F32, dtypes.get("main_grads_dtype", F32)}
    assert all(gradient.dtype == F32 and gradient.abs().max() > 0 for gradient in gradients)
    moment = dtypes.get("exp_avg_dtype", F32)
    alone, first, second = start.clone(), torch.zeros(start.shape, dtype=moment), torch.zeros(start.shape, dtype=moment)
    exact = start.double().numpy()
    m = v = np.zeros_like(exact)
    for step, (gradient, weight) in enumerate(zip(gradients, found, strict=True), start=1):
        lists = [[gradient], [alone], [first], [second]]
        hyper = (recipe.lr, 0.9, 0.999, 1e-8, step, 1, 1, 0.0)
        kernels.adam(2048 * 32, torch.zeros(1, dtype=torch.int), lists, *hyper)
        assert torch.equal(weight, alone)
        g = gradient.double().numpy()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        exact = exact - recipe.lr * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        if moment == F32:
            np.testing.assert_allclose(weight.double().numpy(), exact, rtol=0, atol=2e-8)


@pytest.mark.on_lines("0.12", "0.19")
@pytest.mark.parametrize("fraction", [0.0, 0.001, 1.0])
def test_with_cpu_offload_too_and_clipped_bf16_gradients(fraction: float, case: Any, plugin: Any) -> None:
    offload = {**OFFLOAD, "optimizer_offload_fraction": fraction}
    this = case("offload", False, {"main_grads_dtype": BF16, **offload}, overlap=False, clip_grad=1e-2)
    recipe = resume.recipe_of(this)
    with cpu.offloading(), lab.parallel(recipe), resume.engine(this):
        room = resume.build(recipe)
        start = {name: router.weight.detach().flatten().clone() for name, router in room.routers()}
        room.step_without_optimizer(lab.text_batches(recipe, seed=7))
        room.optimizer.step()
        for name, router in room.routers():
            # Clipped where they lie.
            gradient = router.weight.main_grad.flatten()
            assert gradient.dtype == F32
            moved = start[name].double() - recipe.lr * gradient.double() / (gradient.double().abs() + 1e-8)
            torch.testing.assert_close(router.weight.detach().flatten().double(), moved, rtol=0, atol=2e-8)


@pytest.mark.on_lines("0.12", "0.19")
def test_an_offloaded_optimizer_in_a_format_that_restores_first_weights_is_warned_of(
    case: Any, plugin: Any, tmp_path: Path, caplog: Any
) -> None:
    """Upstream's doing, plugin off and on, and silent: the step after a load writes what the load found."""
    this = case("offload", False, OFFLOAD, overlap=False)
    recipe, kind = resume.recipe_of(this), "dp_zero_gather_scatter"
    for on in (True, False):
        resume.turn("on" if on else "off")
        log._said.clear()  # each warning is said once in a process
        caplog.clear()
        with lab.parallel(recipe), resume.engine(this):
            room = resume.build(recipe)
            first = checkpoint.snapshot(room)
            for _ in range(4):
                resume.train(room, 0)
            checkpoint.save(room, tmp_path / str(on), kind)
            assert ("writes the weights from before the load back into the whole model" in caplog.text) == on
            last = checkpoint.snapshot(room)
            room = resume.build(recipe)
            checkpoint.load(room, tmp_path / str(on), kind)
            loaded = checkpoint.snapshot(room)
            resume.train(room, 0)
            now = checkpoint.snapshot(room)
        name = next(name for name in first if name.endswith("word_embeddings.weight"))
        assert torch.equal(loaded[name], last[name])
        assert (now[name] - first[name]).norm() < (now[name] - last[name]).norm() / 2


# Checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.whole
@pytest.mark.parametrize("remainders", [False, True])
def test_every_format_that_megatron_can_load_without_the_plugin_resumes_with_it(
    remainders: bool, case: Any, resume_record: Any, tmp_path: Path, caplog: Any
) -> None:
    this = case("", remainders, {})
    with lab.parallel(resume.recipe_of(this)), resume.engine(this):
        for name in checkpoint.formats("distributed"):
            upstream = resumed(this, "off", "off", name, tmp_path / f"{name} off")
            caplog.clear()
            log._said.clear()  # each warning is said once in a process
            ours = resumed(this, "on", "on", name, tmp_path / f"{name} on")
            warned = f"cannot load optimizer state that it saves in the format {name} " in caplog.text
            if upstream[0]:
                assert ours[0].partition(":")[0] == upstream[0].partition(":")[0], (name, upstream, ours)
                # A save that fails says so itself.
                assert warned or not (tmp_path / f"{name} on" / "metadata.json").exists(), name
                for direction in ("on->on", "off->on", "on->off"):
                    resume_record(ROW[remainders], name, direction, "upstream refuses")
                continue
            assert not warned
            assert upstream == ours == ("", []), name
            resume_record(ROW[remainders], name, "on->on", "works")
            across(this, name, tmp_path, remainders, resume_record)
    resume.turn("off")


def across(this: dict[str, Any], name: str, folder: Path, remainders: bool, record: Any) -> None:
    for before, after in (("off", "on"), ("on", "off"), ("on", "buffers")):
        failure, wrong = resumed(this, before, after, name, folder / f"{name} {before} {after}")
        outcome = "works"
        if after == "off" and name not in BY_NAME:
            assert failure
            assert not failure.startswith("CheckpointRefusedError")
            outcome = "upstream refuses"
        elif after == "off" and remainders:
            # Nobody of ours is there: the remainder that the bf16 weight needs is not in the checkpoint.
            assert not failure
            outcome = "rounds"
        else:
            assert (failure, wrong) == ("", []), (name, before, after)
        if after != "buffers":
            record(ROW[remainders], name, f"{before}->{after}", outcome)


#: A format in which each kind resumes, with remainders and without.
GOOD = {
    "0.11": ("", "torch"),
    "0.14": ("fully_sharded_model_space", "torch"),
    "0.15": ("fully_sharded_model_space", "torch"),
    "0.16": ("", "torch"),
    "0.17": ("dp_reshardable", "fully_reshardable"),
    "0.19": ("dp_reshardable", "fully_reshardable"),
}


@pytest.mark.whole
@pytest.mark.on_lines("0.11", "0.15", "0.19")
def test_a_resume_in_a_new_process_ends_on_the_bits_of_a_run_that_never_stopped(
    case: Any, release: Version, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    wanted = []
    for name, (remainders, dtypes) in KINDS.items():
        good = GOOD[f"{release.major}.{release.minor}"][not remainders]
        for overlap in (True, False) if name == list(KINDS)[2] else (True,):
            this = case(f"{name}, {overlap}", remainders, dtypes, data_parallel=2, overlap=overlap)
            wanted += [{**this, "formats": [good]}] if good else []
    where = {
        "megatron": request.config.getoption("--megatron"),
        "plugin": True,
        "python_path": [str(request.config.rootpath / "tests" / "programs")],
        "timeout": 300.0,
    }
    two = lab.Recipe(data_parallel=2)
    for rank in lab.run_ranks("resume:write", two, {"cases": wanted, "folder": str(tmp_path)}, **where):
        for name, result in rank.items():
            assert result["disturbed"] == [], f"{name}: saving changed the training"
            assert result["losses"][-1] < result["losses"][0], f"{name} does not learn"
            assert set(result["failures"].values()) == {""}, (name, result["failures"])
    reading = {"cases": wanted, "resharded": [], "folder": str(tmp_path)}
    for rank in lab.run_ranks("resume:read", two, reading, **where):
        for this in wanted:
            for found in rank[f"{this['name']} on"].values():
                assert found == {"failure": "", "loaded": [], "end": [], "losses": True}, this["name"]


#: What upstream can load of a run without the plugin, with remainders and without.
TURNED_ON = {
    "0.11": ([], ["dp_zero_gather_scatter", "fully_sharded_model_space", "torch"]),
    "0.15": (["fully_sharded_model_space"], ["dp_zero_gather_scatter", "fully_reshardable", "torch"]),
    "0.19": (["dp_reshardable"], ["dp_reshardable", "dp_zero_gather_scatter", "fully_reshardable", "torch"]),
}


@pytest.mark.whole
@pytest.mark.on_lines(*TURNED_ON)
def test_two_ranks_turn_the_plugin_on_from_every_format(
    case: Any, release: Version, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    formats = TURNED_ON[f"{release.major}.{release.minor}"]
    cases = [
        {**case(name, remainders, dtypes, data_parallel=2), "formats": formats[not remainders]}
        for name, (remainders, dtypes) in KINDS.items()
        if F16 not in dtypes.values()
    ]
    ranks = lab.run_ranks(
        "precision_aware:turned_on",
        lab.Recipe(data_parallel=2),
        {"cases": cases, "folder": str(tmp_path)},
        megatron=request.config.getoption("--megatron"),
        plugin=True,
        python_path=[str(request.config.rootpath / "tests" / part) for part in ("programs", "")],
    )
    for rank in ranks:
        assert len(rank) == sum(len(this["formats"]) for this in cases) > 0
        assert rank == {key: ["", []] for key in rank}


@pytest.mark.on_lines("0.19")
def test_every_pair_of_dtypes_resumes(case: Any, release: Version, tmp_path: Path) -> None:
    if str(release) != NEWEST:
        return
    moments = list(itertools.product((F32, BF16, F16, FP8), repeat=2))
    mains = [
        (main, remainders, grads)
        for main, remainders in ((F32, True), (F32, False), (F16, False))
        for grads in (F32, BF16)
    ]
    # Every pair of moments, and with every kind of first moment each of the rest.
    for place, (first, second) in enumerate(moments):
        for main, remainders, grads in [mains[(place + place // 4 + offset) % 6] for offset in (0, 3)]:
            dtypes = {"main_params_dtype": main, "main_grads_dtype": grads, "exp_avg_dtype": first}
            this = case("", remainders, {**dtypes, "exp_avg_sq_dtype": second}, overlap=False, layers=1)
            with lab.parallel(resume.recipe_of(this)), resume.engine(this):
                folder = tmp_path / f"{place} {main} {remainders} {grads}"
                name = "dp_reshardable" if remainders else "fully_reshardable"
                if {F16, FP8} & {main, first, second}:
                    resumes_but_for_a_scale(resume.recipe_of(this), name, folder)
                else:
                    assert resumed(this, "on", "on", name, folder) == ("", []), this["fields"]
    resume.turn("off")


def resumes_but_for_a_scale(recipe: Any, name: str, folder: Path) -> None:
    """State in fp16 and fp8 has a scale, which FusedAdam computes anew when it loads: another last bit of it.

    That is TransformerEngine's arithmetic, for every parameter; an fp32 router weight has no scale.
    """
    resume.turn("on")
    room, other = resume.build(recipe), resume.build(recipe)
    resume.train(room, 0)
    checkpoint.save(room, folder, name)
    checkpoint.load(other, folder, name)
    expected, found = checkpoint.snapshot(room), checkpoint.snapshot(other)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        if key.endswith(("exp_avg", "exp_avg_sq", "master_param")):
            torch.testing.assert_close(found[key], value, rtol=2**-22, atol=0)
        else:
            assert torch.equal(found[key], value), key
    for (_, one), (_, two) in zip(room.routers(), other.routers(), strict=True):
        assert torch.equal(one.weight, two.weight)


def test_upstream_saves_and_loads_a_main_copy_that_is_not_the_weight(case: Any, release: Version, plugin: Any) -> None:
    # 0.13 does not give FusedAdam the main copies that it then looks for, unless they are fp16.
    this = case("", False, {"main_params_dtype": F16} if release.minor == 13 else {})
    recipe = resume.recipe_of(this)
    with lab.parallel(recipe), resume.engine(this):
        room = resume.build(recipe)
        start = {name: router.weight.detach().flatten().clone() for name, router in room.routers()}
        resume.train(room, 0)
        for name, router in room.routers():
            optimizer, held, _ = inner_of(room, router)
            with unrepaired.upstreams("precision-aware-save"):
                saved = optimizer._get_main_param_and_optimizer_states(router.weight)["param"]
            # What it was before the first step.
            torch.testing.assert_close(saved, start[name], rtol=2**-10, atol=1e-6)
            assert not torch.equal(saved, held)
            saved = optimizer._get_main_param_and_optimizer_states(router.weight)
            assert saved["param"].data_ptr() == router.weight.data_ptr()
            new = {**{key: value.clone() for key, value in saved.items()}, "param": held + 1}
            with unrepaired.upstreams("precision-aware-load"):
                optimizer._set_main_param_and_optimizer_states(router.weight, {k: v.clone() for k, v in new.items()})
            assert not torch.equal(held, new["param"])
            optimizer._set_main_param_and_optimizer_states(router.weight, new)
            assert torch.equal(router.weight.detach().flatten(), new["param"])


@pytest.mark.on_lines("0.13", "0.19")
def test_where_an_fp8_recipe_leaves_main_copies_to_megatron_nothing_is_ours(case: Any, tmp_path: Path) -> None:
    this = case("", True, {"fp8_recipe": "tensorwise", **BF16_MOMENTS})
    with lab.parallel(resume.recipe_of(this)), resume.engine(this):
        assert resumed(this, "on", "on", "torch", tmp_path / "on") == ("", [])
        resume.turn("on")
        room = resume.build(resume.recipe_of(this))
        resume.train(room, 0)
        for _, router in room.routers():
            _, held, inner = inner_of(room, router)
            assert set(inner.state[held]) == {"exp_avg", "exp_avg_sq"}
    resume.turn("off")
