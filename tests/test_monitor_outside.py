"""The monitor's file for Prometheus, and its values in the W&B run of a program without megatron.training."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron_fp32_router.monitor import outside, sinks
from megatron_fp32_router.patching.registry import registry
from megatron_fp32_router.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
ENTRIES: sinks.Entries = {
    1: {"metrics": {"load/max_vio": 0.1 + 0.2, "bias/spread": 1e-9}, "violations": []},
    "mtp 1.2": {"metrics": {"load/max_vio": 2.0}, "violations": ["weight is torch.bfloat16"]},
}

#: Prometheus' text format 0.0.4, as far as gauges go.
_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_SAMPLE = re.compile(rf'({_NAME})(?:\{{layer="([^"\\\n]*)"\}})? (\S+)')
_COMMENT = re.compile(rf"# (HELP|TYPE) ({_NAME}) (.+)")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(registry, "settings", Settings(monitor=1, monitor_dir=str(tmp_path / "made")))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    return tmp_path / "made"


def read(text: str) -> dict[tuple[str, str | None], float]:
    """What a reader of the format makes of it: samples of one metric stand together, behind what is said of it."""
    found: dict[tuple[str, str | None], float] = {}
    said: list[tuple[str, str]] = []
    assert text.endswith("\n")
    for line in text.splitlines():
        comment, sample = _COMMENT.fullmatch(line), _SAMPLE.fullmatch(line)
        if comment is not None:
            said.append((comment[1], comment[2]))
            assert comment[1] == "HELP" or comment[3] == "gauge"
        else:
            assert sample is not None, line
            assert said[-2:] == [("HELP", sample[1]), ("TYPE", sample[1])], line
            assert (sample[1], sample[2]) not in found
            found[sample[1], sample[2]] = float(sample[3])
    assert len(said) == len(set(said))
    return found


def test_the_text_file_has_every_metric_of_every_layer_and_no_rounding(folder: Path) -> None:
    outside.hand_on(7, ENTRIES)
    assert read((folder / "monitor.prom").read_text(encoding="utf-8")) == {
        ("moe_router_step", None): 7,
        ("moe_router_load_max_vio", "1"): 0.1 + 0.2,
        ("moe_router_load_max_vio", "mtp 1.2"): 2,
        ("moe_router_bias_spread", "1"): 1e-9,
        ("moe_router_violations", "1"): 0,
        ("moe_router_violations", "mtp 1.2"): 1,
    }


def test_a_reader_sees_one_look_or_the_next(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside.hand_on(7, ENTRIES)
    before = (folder / "monitor.prom").read_text(encoding="utf-8")
    seen = []
    replace = os.replace

    def look_then_replace(new: Any, old: Any) -> None:
        seen.append(Path(old).read_text(encoding="utf-8"))
        replace(new, old)

    monkeypatch.setattr(os, "replace", look_then_replace)
    outside.hand_on(8, ENTRIES)
    assert seen == [before]
    assert [path.name for path in folder.iterdir()] == ["monitor.prom"]
    assert "moe_router_step 8\n" in (folder / "monitor.prom").read_text(encoding="utf-8")


def test_what_cannot_be_written_is_one_line_and_no_error(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.touch()
    for step in (1, 2):
        outside.hand_on(step, ENTRIES)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("the monitor cannot write to the text file for Prometheus: FileExistsError: ")


def _fake(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    module = ModuleType("wandb")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_a_run_of_wandb_that_fails_is_one_line_and_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the other network\nis gone")

    _fake(monkeypatch, SimpleNamespace(define_metric=fail, log=fail))
    for step in (1, 2):
        outside.hand_on(step, ENTRIES)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == "the monitor cannot write to W&B: RuntimeError: the other network is gone"
    assert (folder / "monitor.prom").exists()


def test_a_program_that_has_started_no_run_and_one_with_megatron_training_are_left_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _fake(monkeypatch, None)
    outside.hand_on(1, ENTRIES)
    _fake(monkeypatch, SimpleNamespace())  # anything done with it would fail, and be said
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", ModuleType("global_vars"))
    outside.hand_on(2, ENTRIES)
    assert caplog.records == []


#: A program with a step axis of its own, which is not the training's.
PROGRAM = """
import json, sys
from pathlib import Path
import wandb
from megatron_fp32_router.monitor import outside
from megatron_fp32_router.patching.registry import registry
from megatron_fp32_router.settings import Settings

registry.settings = Settings(monitor=1, monitor_dir=sys.argv[1])
run = wandb.init(mode="offline", dir=sys.argv[1], project="test")
for step in (100, 200):
    outside.hand_on(step, {1: {"metrics": {"load/max_vio": step / 1000}, "violations": []}})
    run.log({"loss": 1.0})
    print(json.dumps([run.step, {name: value for name, value in dict(run.summary).items() if name[0] != "_"}]))
run.finish()
"""


def _a_real_run_of_wandb_has_the_values_and_keeps_its_own_steps(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "MEGATRON_FP32_ROUTER": "0", "WANDB_SILENT": "true"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert (first[0], second[0]) == (1, 2)
    assert first[1]["moe_router/all/load/max_vio/max"] == 0.1
    assert second[1]["moe_router/all/load/max_vio/max"] == 0.2
    assert second[1]["moe_router/step"] == 200
    assert second[1]["loss"] == 1


# Where it is not installed there is no such test, as with Ray in test_examples.py: what is skipped counts as not run.
if importlib.util.find_spec("wandb") is not None:
    test_a_real_run_of_wandb_has_the_values_and_keeps_its_own_steps = (
        _a_real_run_of_wandb_has_the_values_and_keeps_its_own_steps
    )
