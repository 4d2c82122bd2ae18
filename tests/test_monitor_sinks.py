"""The monitor's file, writers, steps and exchange between ranks, and what may fail in them; no Megatron needed."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_fp32_router.monitor import collect, look, sinks, watch, writers
from megatron_fp32_router.patching.registry import registry
from megatron_fp32_router.settings import OnMismatch, Settings


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(registry, "settings", Settings(monitor=1, monitor_dir=str(tmp_path / "made")))
    return tmp_path / "made"


ENTRIES: sinks.Entries = {
    layer: {"metrics": {"load/max_vio": float(layer), "flips/tf32": 0.5}, "violations": []} for layer in (1, 2, 3, 4)
}


def test_aggregates_are_numpys() -> None:
    found = sinks.aggregate(ENTRIES)
    values = np.arange(1, 5)
    assert found["load/max_vio/max"] == 4
    assert found["load/max_vio/min"] == 1
    assert found["load/max_vio/mean"] == values.mean()
    for percent in (10, 50, 90):
        assert found[f"load/max_vio/p{percent}"] == pytest.approx(np.percentile(values, percent))


def _file_in_the_folders_place(folder: Path) -> None:
    folder.touch()


def _folder_in_the_files_place(folder: Path) -> None:
    (folder / "monitor.jsonl").mkdir(parents=True)


def _link_in_a_circle(folder: Path) -> None:
    folder.symlink_to(folder)


def _full_disk(folder: Path) -> None:
    folder.mkdir()
    (folder / "monitor.jsonl").symlink_to("/dev/full")


@pytest.mark.parametrize(
    "spoil", [_file_in_the_folders_place, _folder_in_the_files_place, _link_in_a_circle, _full_disk]
)
def test_a_file_that_cannot_be_used_is_one_warning(
    spoil: Callable[[Path], None], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(folder)
    monitor = watch.Monitor()
    _steps(monitor, 3)
    (said,) = [record.getMessage() for record in caplog.records if "no router" not in record.getMessage()]
    assert said.startswith(f"the monitor cannot write {folder / 'monitor.jsonl'}, so looks are missing there: [Errno ")


@pytest.mark.parametrize("refused", [13, 30, 28], ids=["permission", "read-only file system", "no space left"])
def test_what_the_system_refuses_is_one_warning(
    refused: int, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As root, whom no permission stops, and on a disk with room: the system's answer is made up."""

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(refused, os.strerror(refused), str(self))

    for name in ("open", "mkdir"):
        monkeypatch.setattr(Path, name, refuse)
    _steps(watch.Monitor(), 3)
    (said,) = [record.getMessage() for record in caplog.records if "no router" not in record.getMessage()]
    assert os.strerror(refused) in said


@pytest.mark.parametrize("rest", ['{"step": 1e999}', '{"step": 5, "lay', "[" * 10**5, "\0" * 100, '{"step": NaN}'])
def test_a_file_that_a_crash_cut_in_half_goes_on_after_its_last_whole_line(rest: str, folder: Path) -> None:
    folder.mkdir()
    file = folder / "monitor.jsonl"
    file.write_text('{"step": 4, "layer": "all", "metrics": {}, "violations": []}\n' + rest)
    _steps(watch.Monitor(), 1)
    assert json.loads(file.read_text().splitlines()[-1])["step"] == 5


def test_writers_that_fail_are_one_warning_each_and_the_file_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("the network is gone")

    module = ModuleType("megatron.training.global_vars")
    module._GLOBAL_TENSORBOARD_WRITER = SimpleNamespace(add_scalar=fail)  # type: ignore[attr-defined]
    module._GLOBAL_WANDB_WRITER = SimpleNamespace(log=fail)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    _steps(watch.Monitor(), 3)
    for name in ("TensorBoard", "W&B"):
        assert caplog.text.count(f"the monitor cannot write to {name}: RuntimeError: the network is gone") == 1
    assert len((folder / "monitor.jsonl").read_text().splitlines()) == 3


def test_numbers_at_the_end_of_the_range_have_aggregates() -> None:
    far = sys.float_info.max
    entries: sinks.Entries = {
        n: {"metrics": {"a": value}, "violations": []} for n, value in enumerate((far, far, -far))
    }
    assert all(math.isfinite(value) for value in sinks.aggregate(entries).values())


def test_the_writers_of_megatron_training_get_aggregates_and_the_chosen_layers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scalars: dict[str, tuple[float, int]] = {}
    logged: list[tuple[dict[str, float], int]] = []
    module = ModuleType("megatron.training.global_vars")
    module._GLOBAL_TENSORBOARD_WRITER = SimpleNamespace(  # type: ignore[attr-defined]
        add_scalar=lambda name, value, step: scalars.update({name: (value, step)})
    )
    module._GLOBAL_WANDB_WRITER = SimpleNamespace(log=lambda values, step: logged.append((values, step)))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    writers.publish(7, ENTRIES, *sinks.writers())
    assert scalars["moe_router/all/load/max_vio/mean"] == (2.5, 7)
    assert scalars["moe_router/layer_3/load/max_vio"] == (3, 7)
    assert scalars["moe_router/violations"] == (0, 7)
    assert "moe_router/layer_3/flips/tf32" not in scalars
    assert logged == [({name: value for name, (value, _) in scalars.items()}, 7)]


# Steps, failures, other stages -----------------------------------------------------------------------------------


def _steps(monitor: watch.Monitor, number: int) -> None:
    for _ in range(number):
        monitor.at_gradients([torch.nn.Linear(2, 2)], SimpleNamespace())


def test_the_step_is_megatron_trainings_own_and_one_that_is_computed_again_is_not_looked_at_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("megatron.training.global_vars")
    module._GLOBAL_ARGS = SimpleNamespace(curr_iteration=99)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monitor = watch.Monitor()
    _steps(monitor, 2)
    module._GLOBAL_ARGS.curr_iteration = 100  # type: ignore[attr-defined]
    _steps(monitor, 1)
    lines = (folder / "monitor.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [100, 101]


@pytest.mark.parametrize("on_mismatch", ["raise", "warn"])
def test_a_failure_of_the_monitor_ends_the_monitor_and_says_where_it_was(
    on_mismatch: OnMismatch, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def fail(model: Any) -> Any:
        calls.append(model)
        raise ValueError("something\nunforeseen")

    monkeypatch.setattr(watch.look, "layers_of", fail)
    monkeypatch.setattr(registry, "settings", Settings(monitor=1, monitor_dir=str(folder), on_mismatch=on_mismatch))
    _steps(watch.Monitor(), 3)
    assert len(calls) == 1
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("the monitor has ended, and the training goes on without it: on rank 0 it failed with ")
    assert "ValueError: something unforeseen (test_monitor_sinks.py, line " in said


@pytest.fixture(params=["HashStore", "TCPStore"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What ranks meet in: torch's simplest, and the one that every real job has."""
    if request.param == "HashStore":
        made: Any = torch.distributed.HashStore()
    else:
        made = torch.distributed.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(collect, "store", lambda: made)
    return made


def test_notes_of_ranks_are_gathered_and_deleted_before_the_next_look(store: Any) -> None:
    one, two = collect.Exchange(), collect.Exchange()
    for number, exchange in enumerate((one, two)):
        exchange.begin()
        exchange.post(1, f"rank {number}", [[3, {"counts": [1, number]}]])
    found = one.gather(1, ["rank 0", "rank 1"], 5)
    assert found == {"rank 0": [[3, {"counts": [1, 0]}]], "rank 1": [[3, {"counts": [1, 1]}]]}
    two.begin()
    two.post(2, "rank 1", [])
    assert not store.check(["1/rank 1"])  # nothing piles up there
    assert not one.has_ended()


def test_a_silent_rank_is_named_and_waited_for_once_and_the_others_notes_are_kept(store: Any) -> None:
    exchange, other = collect.Exchange(), collect.Exchange()
    exchange.post(1, "pipeline stage 0", [])
    started = time.monotonic()
    assert exchange.gather(1, ["pipeline stage 0", "pipeline stage 1"], 0.2) == {"pipeline stage 0": []}
    assert exchange.gather(2, ["pipeline stage 0", "pipeline stage 1"], 60) == {}
    assert time.monotonic() - started < 5
    assert exchange.ended == "nothing was heard from pipeline stage 1 for 0.2 s"
    assert other.has_ended()
    assert other.ended == exchange.ended


def test_nobody_waits_for_a_rank_that_has_ended_the_monitor(store: Any) -> None:
    exchange, other = collect.Exchange(), collect.Exchange()
    ending = threading.Timer(0.2, lambda: other.end("on rank 1 it failed"))
    ending.start()
    started = time.monotonic()
    assert exchange.gather(1, ["rank 1"], 60) == {}
    assert time.monotonic() - started < 5
    assert exchange.ended == "on rank 1 it failed"
    ending.join()


def _seen(**fields: Any) -> look.Seen:
    return look.Seen("router", SimpleNamespace(), {}, None, **fields)


def test_counts_are_summed_over_ranks_and_no_sum_is_made_up_where_one_is_missing() -> None:
    notes: dict[int, Any] = {rank: {1: {"counts": [rank, 4], "not_finite": {}, "violations": []}} for rank in range(3)}
    for told, expected in ((notes, 3.0 + 12.0), ({0: notes[0], 1: notes[1]}, None)):
        entries: dict[sinks.Layer, sinks.Entry] = {1: {"metrics": {}, "violations": []}}
        collect.complete(entries, {1: _seen()}, told, ranks=3)
        assert entries[1]["metrics"].get("load/assignments") == expected


def test_what_only_some_replicas_find_names_their_ranks() -> None:
    entries: dict[sinks.Layer, sinks.Entry] = {
        1: {"metrics": {"not_finite/weight": 0.0}, "violations": ["weight is bfloat16"]}
    }
    own = collect.note(entries, {1: _seen()})
    broken: Any = {1: {"counts": None, "not_finite": {"not_finite/weight": 3.0}, "violations": ["bias is bfloat16"]}}
    collect.complete(entries, {1: _seen()}, {0: own, 1: own, 2: broken, 3: broken}, ranks=4)
    assert entries[1] == {
        "metrics": {"not_finite/weight": 3.0},
        "violations": ["weight is bfloat16", "bias is bfloat16 (ranks 2-3)"],
    }
