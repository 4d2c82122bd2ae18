"""The monitor's report: findings in words, a page that loads nothing, and files the monitor did not write."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_up import a_run, look, write

from megatron_fp32_router.monitor import bias, page, report, runs


def test_an_experts_death_is_dated(tmp_path: Path) -> None:
    problems = [finding.text for finding in runs.findings(a_run(tmp_path)) if finding.problem]
    assert problems == ["layer 12: 3 idle experts since step 400"]


def test_an_expert_that_came_back_is_dated_from_its_second_death(tmp_path: Path) -> None:
    records = [look(step, 1, load__dead_experts=float(step != 30)) for step in (10, 20, 30, 40, 50)]
    run = runs.read(write(tmp_path / "run.jsonl", records))
    assert runs.findings(run)[0].text == "layer 1: 1 idle expert since step 40"


def test_violations_come_first_and_once(tmp_path: Path) -> None:
    records = [look(10, 1), look(20, 1, ("weight is bfloat16; it was float32 10 steps before",))]
    records += [look(30, 1, ("weight is bfloat16",), update__swallowed=0.5)]
    run = runs.read(write(tmp_path / "run.jsonl", records))
    texts = [finding.text for finding in runs.findings(run)]
    assert texts == [
        "layer 1: weight is bfloat16, at steps 20 to 30",
        "layer 1: up to 50.0% of the bias updates that were due changed nothing (1 of 3 looks, first at step 30)",
    ]


def test_what_is_not_finite_is_dated_and_layers_that_show_it_together_share_a_sentence(tmp_path: Path) -> None:
    records = []
    for step in (10, 20, 30):
        for layer in (1, 2, 3):
            bad = float(step >= 20 and layer < 3) * layer
            records.append(look(step, layer, not_finite__weight=bad, not_finite__bias=float(step == 30 and layer == 3)))
    run = runs.read(write(tmp_path / "run.jsonl", records))
    assert [finding.text for finding in runs.findings(run) if finding.problem] == [
        "layers 1, 2: weight is not finite, at steps 20 to 30",
        "layer 3: bias is not finite, at step 30",
    ]


def test_steps_that_a_restart_repeated_count_as_they_were_written_last(tmp_path: Path) -> None:
    records = [look(step, 1, load__max_vio=value) for step, value in ((10, 1.0), (20, 2.0), (20, 3.0), (30, 4.0))]
    assert runs.read(write(tmp_path / "run.jsonl", records)).series("load/max_vio", 1) == [1, 3, 4]


@pytest.mark.parametrize(
    "text", ["", "{}\n", '{"step": 1, "layer": 1, "metrics": {"a": "b"}, "violations": []}\n', "\x00\xff\n", "[]\n"]
)
def test_a_file_that_the_monitor_did_not_write_is_refused_in_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    assert report.main(argparse.Namespace(run=path, out=None, json=False)) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_file_that_is_not_there_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(argparse.Namespace(run=Path("/dev/zero"), out=None, json=False)) == 2
    assert "found a device" in capsys.readouterr().err
    assert report.main(argparse.Namespace(run=tmp_path / "none.jsonl", out=None, json=False)) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_writes_a_page_that_shows_every_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path)
    assert report.main(argparse.Namespace(run=tmp_path / "run.jsonl", out=None, json=True)) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["layers"] == list(range(1, 13))
    assert summary["findings"][0] == {
        "problem": True,
        "text": "layer 12: 3 idle experts since step 400",
        "topic": "load",
    }
    assert [entry["about"] for entry in summary["headline"]] == ["Precision", "Load"]
    text = (tmp_path / "run.html").read_text()
    assert summary["page"] == str(tmp_path / "run.html")
    assert all(f'data-label="layer">{layer}</th>' in text for layer in range(1, 13))


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 2, "layer": 1, "metrics": {"load/max_vio": NaN}, "violations": []}',
        '{"step": 2, "layer": 1, "metrics": {"load/max_vio": Infinity}, "violations": []}',
        '{"step": 2, "layer": 1, "metrics": {"load/max_vio": 1e999}, "violations": []}',
        '{"step": 2, "layer": 1, "metrics": {"load/max_vio": 1' + "0" * 400 + '}, "violations": []}',
        '{"step": 1' + "0" * 30 + ', "layer": 1, "metrics": {}, "violations": []}',
        '{"step": 2, "layer": true, "metrics": {}, "violations": []}',
        '{"step": 2, "layer": 1' + "0" * 30 + ', "metrics": {}, "violations": []}',
        "[" * 10**5,
        "7",
    ],
    ids=lambda line: line[:60],
)
def test_numbers_that_the_monitor_never_writes_are_refused_by_line(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "run.jsonl", [look(1, 1, load__max_vio=1.0)])
    path.write_text(path.read_text() + line + "\n")
    assert report.main(argparse.Namespace(run=path, out=None, json=False)) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"megatron-fp32-router report: {path}, line 2: ")
    assert not path.with_suffix(".html").exists()


def test_a_drift_that_is_nearly_none_gives_enormous_numbers_that_are_no_error(tmp_path: Path) -> None:
    moved = bias.drift(torch.tensor([0.5, 0.75]), 0.625 - 1e-15, 100)
    assert moved["bias/steps_to_blind_fp32"] > 1e20
    record = {"step": 2, "layer": 1, "metrics": {**moved, "bias/mean": 1e300}, "violations": []}
    assert report.main(argparse.Namespace(run=write(tmp_path / "run.jsonl", [record]), out=None, json=False)) == 0


def test_names_from_a_file_cannot_steer_the_terminal_or_break_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "run.jsonl", [look(1, "a\x1b[2J", ("b\x1b]0;c\x07", "d\ud800"), load__max_vio=1.0)])
    assert report.main(argparse.Namespace(run=path, out=None, json=False)) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "layer a?[2J: b?]0;c?" in said
    # Half a character, in a table and in the data of a drawing.
    write(path, [look(1, "\ud800", load__max_vio=1.0)])
    assert report.main(argparse.Namespace(run=path, out=None, json=False)) == 0
    assert "<body>" in path.with_suffix(".html").read_text()


def test_a_run_is_never_written_over_by_its_own_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "run.html", [look(1, 1, load__max_vio=1.0)])
    before = path.read_bytes()
    for out in (None, tmp_path / "." / "run.html"):
        assert report.main(argparse.Namespace(run=path, out=out, json=False)) == 2
        assert "is the run itself" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_the_page_escapes_what_it_is_given_and_takes_a_single_look(tmp_path: Path) -> None:
    run = runs.read(write(tmp_path / "run.jsonl", [look(1, "<b>", ("<i>",), load__max_vio=1.0)]))
    text = page.render(run, runs.findings(run))
    assert "<b>" not in text
    assert "<i>" not in text


def test_the_headline_speaks_of_precision_and_of_load_separately(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [look(10, layer, load__max_vio=0.5, load__experts=8.0, precision__weight_bits=32.0) for layer in (1, 2)]
    path = write(tmp_path / "run.jsonl", records)
    assert report.main(argparse.Namespace(run=path, out=None, json=False)) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "Precision: no problems.",
        "Load: even; the busiest expert gets 1.50 times its share (layer 1).",
    ]
    records[1] = look(10, 2, ("weight is bfloat16",), load__max_vio=2.0, load__experts=8.0, load__dead_experts=5.0)
    run = runs.read(write(path, records))
    assert runs.headline(run, runs.findings(run)) == [
        ("bad", "Precision", "1 problem, the first: layer 2: weight is bfloat16, at step 10."),
        ("bad", "Load", "layer 2 uneven, 5 of 8 experts idle."),
    ]
    run = runs.read(write(path, [look(10, layer, load__max_vio=1.5 * layer) for layer in (1, 2, 3)]))
    assert runs.headline(run, runs.findings(run)) == [
        ("unknown", "Precision", "nothing in this file tells; docs/monitor.md says where nothing is looked at."),
        ("unknown", "Load", "layers 1, 2, 3 uneven, the busiest expert gets 5.50 times its share in layer 3."),
    ]
    run = runs.read(write(path, [look(10, 1, not_finite__weight=2.0)]))
    assert [state for state, _, _ in runs.headline(run, runs.findings(run))] == ["unknown", "bad", "unknown"]


def test_the_page_says_what_wrote_the_file_and_that_an_old_file_does_not(tmp_path: Path) -> None:
    about = {"time": "2026-11-29T01:00:00Z", "plugin": "0.1.0", "megatron": "Megatron-Core 0.16.1"}
    records = [
        look(10, 1, load__max_vio=1.0),
        {**look(10, "all"), "about": {**about, "settings": {"protect": "buffers", "monitor": 10}}},
    ]
    run = runs.read(write(tmp_path / "run.jsonl", records))
    text = page.render(run, runs.findings(run))
    for part in ("Megatron-Core 0.16.1", "protect=buffers, monitor=10", "2026-11-29T01:00:00Z", "1 look at 1 routers"):
        assert part in text
    old = runs.read(write(tmp_path / "run.jsonl", records[:1]))
    assert "not in this file, which an older version wrote" in page.render(old, runs.findings(old))


def test_a_name_that_a_log_cannot_spell_is_no_traceback(tmp_path: Path) -> None:
    path = write(tmp_path / "run.jsonl", [look(1, "é", ("weight is bfloat16",), load__max_vio=1.0)])
    done = subprocess.run(
        [sys.executable, "-m", "megatron_fp32_router", "report", str(path)],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "! layer ?: weight is bfloat16" in done.stdout
