"""What programs read of ours is as docs/schemas/ says: real output, and a changed one that must be refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from bootstrap import NEWEST, RELEASES, ensure_release
from jsonschema import Draft202012Validator

import megatron_fp32_router
from megatron_fp32_router import cli
from megatron_fp32_router.monitor import sinks
from megatron_fp32_router.patching.registry import registry

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "tests" / "corpus" / "audit"


def _wrong(name: str, found: Any) -> list[str]:
    schema = json.loads((ROOT / "docs" / "schemas" / f"{name}.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(found)]


def _printed(*arguments: str | Path) -> Any:
    command = [sys.executable, "-m", "megatron_fp32_router", *map(str, arguments), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["monitor", "status", "check", "doctor", "audit"])
def test_a_schema_refuses_what_is_something_else(name: str) -> None:
    assert _wrong(name, {"step": "one"})


def test_monitor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "path", lambda: tmp_path / "monitor.jsonl")
    entry = sinks.Entry(metrics={"load/max_vio": 0.5}, violations=["weight is torch.bfloat16"])
    assert sinks.append(3, {1: entry, "mtp 1": entry})
    lines = [json.loads(line) for line in (tmp_path / "monitor.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["layer"] for line in lines] == [1, "mtp 1", "all"]
    assert [_wrong("monitor", line) for line in lines] == [[], [], []]


def test_status() -> None:
    assert not registry.active
    found = [asdict(record) for record in megatron_fp32_router.status()]
    assert found
    assert _wrong("status", found) == []


@pytest.mark.parametrize("release", [RELEASES[0], NEWEST])
def test_check(release: str) -> None:
    found = _printed("check", "--megatron", ensure_release(release))
    assert found["verdict"] == "fits"
    assert found["targets"]
    assert _wrong("check", found) == []


def test_check_of_what_is_no_megatron(tmp_path: Path) -> None:
    found = _printed("check", "--megatron", tmp_path)
    assert found["verdict"] == "unknown"
    assert _wrong("check", found) == []


@pytest.mark.parametrize("arguments", [(), ("--shape", "64x128x8", "32x64x12")], ids=["", "device"])
def test_doctor(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["doctor", "--megatron", str(ensure_release(NEWEST)), "--json", *arguments])
    found = json.loads(capsys.readouterr().out)
    assert (found["device"] is None) == (not arguments)
    assert _wrong("doctor", found) == []


def test_audit(tmp_path: Path) -> None:
    paths = sorted(path for path in CORPUS.iterdir() if path.is_dir())
    found = _printed("audit", *paths, tmp_path)
    assert len(found) == len(paths) + 1
    assert "error" in found[-1]
    assert _wrong("audit", found) == []
    # One path: the object itself.
    assert _wrong("audit", found[0]) == []
