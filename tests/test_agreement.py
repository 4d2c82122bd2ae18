"""Agreement between ranks: a job in which one rank is not protected like the others stops before its first step.

Real ranks on a real Megatron, the oldest and the newest; what is compared does not differ between releases.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from bootstrap import RELEASES, ensure_release
from checking import FINALIZE, copier

from megatron_fp32_router import lab
from megatron_fp32_router.patching import drift, gate
from megatron_fp32_router.patching.digest import digest
from megatron_fp32_router.patching.megatron import Megatron, read_version
from megatron_fp32_router.patching.registry import PatchStatus
from megatron_fp32_router.ranks import agreement
from megatron_fp32_router.settings import SettingsError, from_environment

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "tests" / "programs"

TINY = {"seq_length": 16, "hidden": 16, "moe_ffn": 16, "experts": 4}

#: What finalize_model_grads asks before it updates biases.
UPDATE = "\n    if config.moe_router_enable_expert_bias:\n"


def run(target: str, release: str, recipe: lab.Recipe, arguments: Any = None, **options: Any) -> list[Any]:
    target = f"agreement_ranks:{target}"
    return lab.run_ranks(target, recipe, arguments, megatron=ensure_release(release), python_path=[PROGRAMS], **options)


def edit(tree: Path, old: str, new: str) -> None:
    text = (tree / FINALIZE).read_text(encoding="utf-8")
    assert old in text
    (tree / FINALIZE).write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize("release", [RELEASES[0], RELEASES[-1]])
def test_all_ranks_agree_or_all_say_what_differs(release: str, tmp_path: Path) -> None:
    fork = copier(tmp_path)(release, FINALIZE, UPDATE, "\n    if config.elsewhere:\n")
    arguments = {"fork": str(fork / "megatron/core/__init__.py")}
    ranks = run("scenes", release, lab.Recipe(pipeline_parallel=2, **TINY), arguments, plugin=True, logs=tmp_path)
    printed = (tmp_path / "rank-0.log").read_text()
    scenes = {scene.partition("\n")[0]: scene for scene in printed.split("--- ")[1:]}
    for name in ("all alike", "all alike, in the same store", "slow"):
        # One line for all, though the first stage has no router.
        assert scenes[name].count("all 2 ranks on 1 host agree: 1 router with ") == 1
        assert "0 to 1 a rank" in scenes[name]
        assert [rank[name] for rank in ranks] == ["", ""]
    for name in ("broadcast_params asks", "the balance update asks", "user buffers ask"):
        assert scenes[name].count(" agree: ") == 1
    assert ranks[0]["left in the store"] == ranks[1]["left in the store"] == ""
    assert "waiting up to 300 s for the optimizer of rank 1, to learn" in scenes["slow"]
    assert "waiting" not in scenes["all alike"]
    assert scenes["nobody compares"].count("AGREE_TIMEOUT=0: the ranks do not compare") == 1
    assert " agree: " not in scenes["nobody compares"]
    assert " agree: " not in (tmp_path / "rank-1.log").read_text()
    for rank in ranks:
        assert "MEGATRON_FP32_ROUTER_PROTECT is 'all' on rank 0 (host " in rank["other settings"]
        assert "), but 'buffers' on rank 1 (host " in rank["other settings"]
        assert "MEGATRON_FP32_ROUTER_PRODUCTS is 'auto' on rank 0 (host " in rank["other settings"]
        assert "MEGATRON_FP32_ROUTER_LIKE is 'unset' on rank 0 (host " in rank["other settings"]
        assert "), but 'vllm==0.33.0/deepseek_v3' on rank 1 (host " in rank["other settings"]
        assert "the plugin's version is '0.1.0' on rank 0 (host " in rank["other version"]
        assert "but '99.0' on rank 1 (host " in rank["other version"]
        assert "PROTECT is" not in rank["other version"]
        told = rank["other Megatron and monitor"]
        source = next(line for line in told.splitlines() if "the fingerprint of Megatron's source is '" in line)
        assert re.search(rf"' on rank 0 \(host \S+: {ensure_release(release).resolve()}/megatron/core\), but '", source)
        assert re.search(rf"' on rank 1 \(host \S+: {fork.resolve()}/megatron/core\)", source)
        assert "MEGATRON_FP32_ROUTER_MONITOR is 'off' on rank 0 (host " in told
        assert "), but '5' on rank 1 (host " in told
        assert len([line for line in told.splitlines() if line.startswith("  - ")]) == 2


def test_a_rank_without_the_plugin_stops_the_others_in_bounded_time_and_the_job_ends(tmp_path: Path) -> None:
    # The way users start it. MEGATRON_FP32_ROUTER=0 on one rank is as good as no plugin there.
    program = (
        "import runpy, sys, megatron_fp32_router; sys.argv[:] = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    (tmp_path / "armed.py").write_text(program)
    switch = 'MEGATRON_FP32_ROUTER=$((LOCAL_RANK == 0)) exec "$0" "$@"'
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    command += ["sh", "-c", switch, sys.executable, str(tmp_path / "armed.py"), str(PROGRAMS / "train.py")]
    path = [ensure_release(RELEASES[-1]), PROGRAMS / "pretence", ROOT]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MEGATRON_FP32_ROUTER")}
    started = time.monotonic()
    done = subprocess.run(
        command,
        env={
            **inherited,
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "LAB": str(ROOT / "megatron_fp32_router" / "lab"),
            "MEGATRON_FP32_ROUTER_AGREE_TIMEOUT": "2",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    assert time.monotonic() - started < 90
    assert "RanksDisagreeError: the 2 ranks do not all run the plugin alike" in done.stderr, done.stderr
    # At least the two seconds: on a busy machine a rank may look at the clock late.
    host = re.escape(os.uname().nodename)
    silence = rf"nothing was heard for \d+ s from rank 1 \(host {host}\): the plugin is not on there"
    assert re.search(silence, done.stderr), done.stderr
    assert "rank 1: {" not in done.stdout  # nobody came to the end


@pytest.mark.parametrize(
    ("release", "world", "arguments"),
    [
        (RELEASES[0], 3, {"first": 0, "train": 2}),
        (RELEASES[-1], 4, {"first": 1, "train": 2}),
        (RELEASES[-1], 4, {"first": 1, "train": 2, "handed": True}),
    ],
    ids=["oldest", "newest", "newest, groups handed to the model"],
)
def test_ranks_that_never_train_do_not_delay_the_others(
    release: str, world: int, arguments: dict[str, Any], tmp_path: Path
) -> None:
    env = {"MEGATRON_FP32_ROUTER_AGREE_TIMEOUT": "60"}
    recipe = lab.Recipe(data_parallel=world, **TINY)
    run("beside_others", release, recipe, arguments, plugin=True, env=env, logs=tmp_path)
    first = arguments["first"]
    logs = [(tmp_path / f"rank-{rank}.log").read_text() for rank in range(world)]
    assert [log.count(f" (of {world}) on ") for log in logs] == [int(rank == first) for rank in range(world)], logs
    assert f"all 2 ranks (of {world}) on 1 host agree: 4 routers with " in logs[first]
    others = "rank 2" if world == 3 else "ranks 0, 3"
    assert f"no process group of Megatron's joins them to these: {others}, protect=all" in logs[first]
    # Then all of them train, and those that had agreed are asked about the others only.
    assert [log.count(f"all {world} ranks on ") for log in logs] == [1] + [0] * (world - 1), logs
    assert "no optimizer yet" not in logs[0]


def test_a_training_rank_without_the_plugin_is_noticed_beside_ranks_that_never_train(tmp_path: Path) -> None:
    with pytest.raises(lab.RankFailedError) as caught:
        run(
            "beside_others",
            RELEASES[-1],
            lab.Recipe(data_parallel=4, **TINY),
            {"first": 1, "train": 2},
            plugin=[True, False, True, True],
            env={"MEGATRON_FP32_ROUTER_AGREE_TIMEOUT": "1"},
        )
    assert (caught.value.rank, caught.value.kind) == (2, "megatron_fp32_router.errors.RanksDisagreeError")
    assert "the 2 ranks do not all run the plugin alike" in str(caught.value)
    assert re.findall(r"nothing was heard for \d+ s from (.*) \(host", str(caught.value)) == ["rank 1"]


def test_under_warn_the_first_rank_that_has_the_plugin_warns_and_training_goes_on(tmp_path: Path) -> None:
    variables = {"MEGATRON_FP32_ROUTER_ON_MISMATCH": "warn", "MEGATRON_FP32_ROUTER_AGREE_TIMEOUT": "0.5"}
    # Pipeline stages share no gradients, so that nothing hangs here.
    recipe = lab.Recipe(pipeline_parallel=2, **TINY)
    run("train", RELEASES[-1], recipe, plugin=[False, True], env=variables, logs=tmp_path)
    assert "do not all run the plugin alike" not in (tmp_path / "rank-0.log").read_text()
    warned = (tmp_path / "rank-1.log").read_text()
    assert warned.count("do not all run the plugin alike") == 1
    assert "from rank 0 (host unknown, no rank of that node runs the plugin)" in warned


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "5 minutes"])
def test_a_timeout_is_a_number_of_seconds(value: str) -> None:
    with pytest.raises(SettingsError, match="accepted is a number of seconds"):
        from_environment({"MEGATRON_FP32_ROUTER_AGREE_TIMEOUT": value})


def test_a_patch_that_only_one_rank_has_wrapped_or_not_imported_is_no_difference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records = [
        PatchStatus("one", "a.b", "displaced", "wrapped by profiler.trace"),
        PatchStatus("two", "a.c", "displaced", "replaced by somebody.else"),
        PatchStatus("three", "a.d", "armed", "waits for the import"),
    ]
    monkeypatch.setattr(agreement, "status", lambda: records)
    monkeypatch.setattr(agreement, "runs", lambda patch_id: patch_id == "one")
    monkeypatch.setitem(sys.modules, "megatron.core", ModuleType("megatron.core"))
    says = agreement.what_must_agree()
    patches = {label: value for label, value in says.items() if label.startswith("patch ")}
    assert patches == {"patch 'one'": "applied", "patch 'two'": "displaced"}


def test_a_megatron_is_identified_by_the_code_of_its_functions_not_by_version_or_path(tmp_path: Path) -> None:
    def digest_of(tree: Path) -> str:
        digest.cache_clear()
        gate.state_of.cache_clear()
        drift.judge_of.cache_clear()
        core = tree / "megatron" / "core"
        return digest(Megatron(core, read_version(core / "package_info.py")))

    release = digest_of(ensure_release("0.19.2"))
    tree = copier(tmp_path)("0.19.2")
    assert digest_of(tree) == release
    edit(tree, UPDATE, f"\n    # a comment{UPDATE}")
    assert digest_of(tree) == release
    found = {release}
    edit(tree, UPDATE, "\n    if config.elsewhere:\n")
    found.add(digest_of(tree))
    (tree / FINALIZE).write_text("def broken(", encoding="utf-8")
    found.add(digest_of(tree))
    (tree / FINALIZE).unlink()
    found.add(digest_of(tree))
    assert len(found) == 4


def test_without_process_groups_a_rank_need_not_agree_even_after_a_failure() -> None:
    agreement._Agreed.group, agreement._Agreed.failure = weakref.ref(type("Gone", (), {})()), "an older group's failure"
    agreement.agree()
    agreement.publish()
