"""scripts/gpu: one command for all that needs a GPU; on a machine without one it says so and measures nothing."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest
import torch
from bootstrap import ROOT

from megatron_fp32_router import cli


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    loader = SourceFileLoader("gpu_command", str(ROOT / "scripts" / "gpu"))
    module = module_from_spec(spec_from_loader(loader.name, loader))  # type: ignore[arg-type]
    loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "gpu")
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: it would take minutes")
def test_without_a_gpu_it_says_so_plainly_and_ends_with_2() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "gpu"], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "sees no GPU on this machine, so NOTHING WAS MEASURED" in done.stderr


def test_what_it_runs_exists_and_takes_less_than_eight_minutes(command: Any, tmp_path: Path) -> None:
    steps = command.steps(tmp_path)
    assert sum(limit for _, limit, _ in steps.values()) < 8 * 60
    doctor, tests, bench = (whole for whole, _, _ in steps.values())
    arguments = cli._parser(with_demo=False).parse_args(doctor[doctor.index("doctor") :])
    assert arguments.device
    assert arguments.json
    assert "tests/gpu" in tests
    assert (ROOT / bench[-2]).is_file()
    assert bench[-1] == "--gpu"


def test_every_step_runs_and_is_kept_and_one_that_fails_or_hangs_is_named(command: Any, capsys: Any) -> None:
    def step(program: str, limit: int, name: str) -> Any:
        return [sys.executable, "-S", "-c", program], limit, name

    hangs = "import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])"
    begun = time.monotonic()
    code = command.run(
        {
            "bad": step("print('one'); raise SystemExit(3)", 30, "1"),
            "slow": step(hangs, 1, "2"),
            "good": step("print('two')", 30, "3"),
        }
    )
    assert time.monotonic() - begun < 30
    assert code == 1
    shown = capsys.readouterr().out
    assert "bad: FAILED, exit code 3" in shown
    assert "slow: FAILED, not done after 1 s" in shown
    assert "good: passed" in shown
    assert (command.RESULTS / "1").read_text() == "one\n"
    assert (command.RESULTS / "3").read_text() == "two\n"
    assert command.run({"good": step("", 30, "4")}) == 0
