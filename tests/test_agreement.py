"""Agreement between ranks: a job in which one rank is not protected like the others stops before its first step.

Real ranks on a real Megatron, the oldest and the newest; what is compared does not differ between releases.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bootstrap import RELEASES, ensure_release
from checking import FINALIZE, copier
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_fp32_router import lab
from megatron_fp32_router.patching import drift, gate
from megatron_fp32_router.patching.digest import digest
from megatron_fp32_router.patching.megatron import Megatron, read_version
from megatron_fp32_router.patching.registry import PatchStatus
from megatron_fp32_router.ranks import agreement
from megatron_fp32_router.ranks.spans import ranks_text
from megatron_fp32_router.ranks.verdict import judge
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
    assert scenes["nobody compares"].count("AGREE_TIMEOUT=0: nobody compares") == 1
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
def test_ranks_that_never_train_are_not_waited_for(
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


def test_a_megatron_is_known_by_what_its_functions_do_and_not_by_its_version_or_place(tmp_path: Path) -> None:
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


def test_without_process_groups_there_is_nobody_to_agree_with_even_after_a_failure() -> None:
    agreement._Agreed.group, agreement._Agreed.failure = weakref.ref(type("Gone", (), {})()), "an older group's failure"
    agreement.agree()
    agreement.publish()


# Who is asked ----------------------------------------------------------------------------------------------------


@pytest.fixture
def of_8() -> Iterator[Callable[[list[int]], Any]]:
    """`of_8(ranks)`: a process group of these, in a job of 8 whose other ranks torch only pretends to have."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield dist.new_group
    dist.destroy_process_group()


def test_whoever_shares_a_group_is_found_wherever_the_group_is_held(
    of_8: Callable[[list[int]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = ModuleType("parallel_state")
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", state)
    assert agreement._reach() == 0
    state.one, state.several, state.named = of_8([0, 1]), [of_8([0, 2])], {"cp": of_8([0, 3])}
    assert agreement._ranks(agreement._reach()) == [0, 1, 2, 3]
    # As DDP gets it, and as a layer deep in the model holds it.
    assert agreement._ranks(agreement._reach(SimpleNamespace(dp=of_8([0, 4])))) == [0, 1, 2, 3, 4]
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Identity()))
    model[0][0].tp_group = of_8([0, 5])
    model[0].pg_collection = SimpleNamespace(ep=of_8([0, 6]))
    assert agreement._ranks(agreement._reach(model)) == [0, 1, 2, 3, 5, 6]
    dist.destroy_process_group(state.one)
    assert agreement._ranks(agreement._reach()) == [0, 2, 3]


def test_only_those_are_named_with_whom_nothing_is_agreed_yet(
    of_8: Callable[[list[int]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", ModuleType("megatron.core"))
    monkeypatch.setattr(agreement, "_Agreed", type("_Agreed", (), {"peers": 0b111, "ranks": 0b11}))
    assert agreement._statement(at_optimizer=True)["peers"] == hex(0b101)
    # Where no group of Megatron's is known, everybody.
    agreement._Agreed.peers = 0
    assert agreement._statement(at_optimizer=True)["peers"] == hex(0b11111111)


def grid(rank: int) -> int:
    """Ranks of 4,096 that share a tensor-, pipeline- or data-parallel group with `rank`: TP=8, DP=32, PP=16."""
    tensor, data, pipeline = rank % 8, rank // 8 % 32, rank // 256
    peers = [t + 8 * data + 256 * pipeline for t in range(8)]
    peers += [tensor + 8 * d + 256 * pipeline for d in range(32)]
    peers += [tensor + 8 * data + 256 * p for p in range(16)]
    return sum(1 << peer for peer in set(peers))


class Counted:
    """A store that counts its operations."""

    def __init__(self, store: Any) -> None:
        self.store, self.calls = store, 0

    def __getattr__(self, name: str) -> Any:
        self.calls += 1
        return getattr(self.store, name)


def test_all_4096_ranks_of_a_training_are_found_with_few_operations() -> None:
    store = Counted(dist.HashStore())
    for rank, said in statements(4096).items():
        store.set(str(rank), json.dumps({**said, "peers": hex(grid(rank))}))
    store.calls, heard = 0, {}
    found = agreement._listen(store, heard, grid(0))
    assert found == (1 << 4096) - 1
    assert len(heard) == 4096
    assert store.calls < 20
    store.delete_key("4095")
    heard = {}
    assert agreement._listen(store, heard, grid(0)) == found  # others name it,
    assert 4095 not in heard  # but it has said nothing


def wait(ranks: dict[int, int], timeout: float, monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """What ranks (rank -> whom it names) of a job of 8 are told, each a thread."""
    store, told = dist.HashStore(), {}
    settings = SimpleNamespace(agree_timeout=timeout, log="info")
    monkeypatch.setattr(agreement, "registry", SimpleNamespace(settings=settings))
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)

    def one(rank: int, peers: int) -> None:
        store.set(str(rank), json.dumps({**statements(8)[rank], "peers": hex(peers)}))
        told[rank] = agreement._wait(store, rank, peers)
        agreement._leave(store, rank, told[rank])

    threads = [threading.Thread(target=one, args=item, daemon=True) for item in ranks.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not store.check(["judge"])
    assert not any(store.check([str(rank)]) or store.check([f"verdict/{rank}"]) for rank in ranks)
    return told


def test_two_trainings_in_one_job_are_two_agreements(monkeypatch: pytest.MonkeyPatch) -> None:
    # 1, 2, 5 hang together through 2 only.
    ranks = {1: 0b110, 2: 0b100110, 5: 0b100100, 3: 0b11000, 4: 0b11000}
    told = wait(ranks, 300.0, monkeypatch)
    assert {rank: (found["ranks"], found["problems"]) for rank, found in told.items()} == {
        **dict.fromkeys((1, 2, 5), (hex(0b100110), [])),
        **dict.fromkeys((3, 4), (hex(0b11000), [])),
    }
    assert told[5]["line"].startswith("all 3 ranks (of 8) on 1 host agree: 6 routers")
    assert told[5]["line"].endswith(": ranks 0, 3-4, 6-7")


def test_where_the_first_rank_is_silent_another_one_speaks_for_all_of_its_training_and_only_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = wait({1: 0b11, 2: 0b101, 3: 0b11000, 4: 0b11000, 6: 0b1100000}, 0.3, monkeypatch)
    for rank in (1, 2):
        # 1 and 2 need not know of each other: 0, which joins them, has not said so.
        assert re.findall("from (.*) \\(host", "".join(told[rank]["problems"])) == ["rank 0"]
    assert told[3]["problems"] == told[4]["problems"] == []
    assert re.findall("from (.*) \\(host", "".join(told[6]["problems"])) == ["rank 5"]


def test_a_verdict_that_has_been_given_is_not_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two ranks may lose patience at once. Who has read the first verdict has left, and nobody would delete another.
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    store = dist.HashStore()
    store.set("verdict/0", "the first")
    agreement._give_verdict(store, 0, statements(2), 0b11, 1.0)
    assert store.get("verdict/0") == b"the first"
    assert not store.check(["verdict/1"])


# The verdict itself: far more ranks than a machine can start ------------------------------------------------------


def statements(world: int, ranks_per_host: int = 8, **says: str) -> dict[int, dict[str, Any]]:
    return {
        rank: {
            "says": {"the plugin's version": "1.0", **says},
            "host": f"node{rank // ranks_per_host}",
            "local world size": str(ranks_per_host),
            "at optimizer": True,
            "routers": 2,
            "tensors": 6,
        }
        for rank in range(world)
    }


def test_a_verdict_on_4096_ranks_is_short_quick_and_names_ranks_and_hosts() -> None:
    said = statements(4096)
    assert judge(range(4096), 4096, said, 1.0)["problems"] == []
    assert judge(range(4096), 4096, said, 1.0)["line"].startswith(
        "all 4096 ranks on 512 hosts agree: 8192 routers with 24576 "
    )
    assert judge(range(4096), 4096, said, 1.0)["line"].endswith(" replicas counted, 2 a rank")
    for rank in [7, *range(16, 24)]:
        del said[rank]
    said[4095]["says"]["the plugin's version"] = "1.1"
    started = time.monotonic()
    problems = judge(range(4096), 4096, said, 300.0)["problems"]
    assert time.monotonic() - started < 1
    assert len(problems) == 3
    assert problems[0].startswith("nothing was heard for 300 s from rank 7 (host node0): ")
    assert "from ranks 16-23 (host unknown, no rank of that node runs the plugin): " in problems[1]
    assert problems[2].endswith("and 507 more), but '1.1' on rank 4095 (host node511)")


def test_what_only_some_ranks_mention_is_not_compared_and_a_late_optimizer_is_told() -> None:
    said = statements(4)
    said[3]["says"]["patch 'gating'"] = "applied"
    said[2]["at optimizer"] = False
    found = judge(range(4), 4, said, 300.0)
    assert found["problems"] == []
    assert found["line"].endswith("; no optimizer yet on rank 2")
    assert found["says"]["patch 'gating'"] == "applied"
    said[2]["says"]["patch 'gating'"] = "displaced"
    assert judge(range(4), 4, said, 300.0)["problems"] == [
        "patch 'gating' is 'displaced' on rank 2 (host node0), but 'applied' on rank 3 (host node0)"
    ]


def test_ranks_are_listed_as_spans() -> None:
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([7, 0, 1, 2]) == "ranks 0-2, 7"
    assert ranks_text(list(range(0, 100, 2))).endswith("38 and 30 more spans")
