"""The demo: what it decides, what it prints, and what its page says. tests/test_pages.py looks at it in a browser."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up import COUNTS_SLE, RATE, biases_of, demo_data, demo_run, release_data

from megatron_fp32_router.cli import main
from megatron_fp32_router.lab import demo, demo_page, demo_picture, demo_report
from megatron_fp32_router.lab.demo_run import compared

ROOT = Path(__file__).resolve().parent.parent


def test_an_update_that_is_rounded_away_is_counted_as_swallowed() -> None:
    updates = demo_run(good=False)["updates"]
    assert (updates["expected"], updates["exact"], updates["stuck"], updates["wrong"]) == (2, 0, 2, 2)


def test_exact_updates_are_all_right_and_a_balanced_expert_stays() -> None:
    updates = demo_run(good=True)["updates"]
    assert (updates["expected"], updates["exact"], updates["wrong"]) == (2, 2, 0)


@pytest.mark.parametrize("less", [True, False])
def test_a_step_that_bf16_makes_a_thousandth_smaller_is_no_exact_update(less: bool) -> None:
    step = float(torch.tensor(RATE).bfloat16()) if less else RATE
    assert abs(step / RATE - 1) < 0.001
    biases = biases_of((0.0, 0.0), (-step, step), (-step, step)).astype(np.float32).astype(np.float64)
    found = compared(biases, COUNTS_SLE, RATE)
    assert found["updates"]["wrong_size"] == found["updates"]["wrong"] == 2 * less
    assert found["step"] == pytest.approx(step)


def test_a_step_the_wrong_way_a_step_of_the_wrong_size_and_an_unasked_one_are_told_apart() -> None:
    backwards = compared(biases_of((0.0, 0.0), (RATE, 2 * RATE), (0.0, 2 * RATE)), COUNTS_SLE, RATE)["updates"]
    assert (backwards["reversed"], backwards["wrong_size"], backwards["unasked"], backwards["wrong"]) == (
        1,
        1,
        1,
        3,
    )


def test_the_page_shows_every_row_of_the_table_and_escapes_what_it_is_given() -> None:
    data = demo_data(release_data(), release_data(megatron="0.19.2"))
    page = demo_page.render(data)
    for what, *_ in demo_report.rows(data):
        assert what in page
    assert demo_report.header(data) == ["", "0.11.0 off", "0.11.0 on", "0.19.2 off", "0.19.2 on"]
    assert "&lt;fp32&gt;" in page
    assert "the <fp32> weight" not in page


def test_two_releases_fit_beside_each_other_in_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    demo._print(demo_data(release_data(), release_data(megatron="0.19.2")), [])
    said = capsys.readouterr().out.splitlines()
    assert max(map(len, said)) <= 80
    (head,) = (line for line in said if "0.11.0 off" in line)
    assert head.split() == ["0.11.0", "off", "0.11.0", "on", "0.19.2", "off", "0.19.2", "on"]
    assert said[0].startswith("Megatron-Core 0.11.0, plugin off: the token counter is wrong by up to 18 tokens")


def test_the_page_tells_the_story_in_its_order() -> None:
    page = demo_page.render(demo_data(release_data(), release_data(megatron="0.19.2")))
    story = ["error of the token counter", "4 updates due", "the bias of one expert", "MaxVio, mean of layers"]
    places = [page.index(part) for part in story]
    assert places == sorted(places)
    for release in ("0.11.0", "0.19.2"):
        assert f"Megatron-Core {release}: error of the token counter" in page


def test_a_plugin_that_breaks_its_promise_is_not_called_good() -> None:
    data = demo_data(release_data(), release_data(on_is_good=False, megatron="0.19.2"))
    assert not demo_report.protected(data)
    assert demo_report.protected(demo_data())
    assert "DID NOT KEEP ITS PROMISE" in demo_page.render(data)
    assert [state for state, _, _ in demo_report.findings(data)] == ["bad", "good", "bad", "bad"]


def test_outcomes_that_differ_less_than_seeds_do_are_called_noise() -> None:
    release = release_data()
    said = demo_report.noise(release, "max_vio", "load violation")
    assert (
        said
        == "load violation 0.25 to 0.50 off, 0.25 to 0.50 on (2 seeds): noise, no difference that this demo could show."
    )
    for run in release["on"]:
        run["max_vio"] += 1
    assert "ranges do not overlap" in demo_report.noise(release, "max_vio", "load violation")
    for name in ("off", "on"):
        del release[name][1:]
    assert "(1 seed): noise" in demo_report.noise(release, "max_vio", "load violation")


def test_a_picture_of_one_release_and_one_of_two_can_be_drawn(tmp_path: Path) -> None:
    miscounting = release_data(megatron="0.19.2") | {"off": [demo_run(good=True), demo_run(good=True, seed=2)]}
    for releases in ([release_data()], [release_data(), miscounting]):
        path = tmp_path / "new folder" / f"{len(releases)}.png"
        demo_picture.draw(demo_data(*releases), path)
        assert path.read_bytes().startswith(b"\x89PNG")


def _command(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MEGATRON_FP32_ROUTER")}
    return subprocess.run(
        [sys.executable, "-m", "megatron_fp32_router", "demo", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture
def empty_tree(tmp_path: Path) -> Path:
    """A folder that passes for a Megatron as long as nobody imports it."""
    (tmp_path / "megatron" / "core").mkdir(parents=True)
    return tmp_path


def test_a_folder_without_a_megatron_is_refused_in_one_line(tmp_path: Path) -> None:
    done = _command("--megatron", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"megatron-fp32-router demo: --megatron {tmp_path}: there is no megatron/core in it\n"


@pytest.mark.parametrize("option", ["--steps=0", "--steps=-3", "--seeds=many", "--seeds=1.5"])
def test_a_number_that_is_none_is_refused_in_one_line(empty_tree: Path, option: str) -> None:
    done = _command("--megatron", str(empty_tree), option)
    assert (done.returncode, done.stdout) == (2, "")
    said = f"megatron-fp32-router demo: {option.replace('=', ' ')}: expected a whole number of at least 1\n"
    assert done.stderr == said


def test_a_picture_without_matplotlib_is_refused_before_anything_trains(
    empty_tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert main(["demo", "--megatron", str(empty_tree), "--picture", "drawn.png"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("megatron-fp32-router demo: --picture drawn.png: matplotlib is not installed: ")


def test_a_release_that_is_given_twice_is_refused_in_one_line(empty_tree: Path) -> None:
    done = _command("--megatron", str(empty_tree), "--megatron", str(empty_tree))
    assert done.returncode == 2
    assert done.stderr.endswith(f"of unknown version was named before, as {empty_tree}\n")


def test_an_output_folder_that_cannot_be_made_is_refused_in_one_line(empty_tree: Path) -> None:
    occupied = empty_tree / "file"
    occupied.touch()
    done = _command("--megatron", str(empty_tree), "--out", str(occupied))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--release", "9.9"], ["--seeds", "0"], ["--bogus"]])
def test_the_script_refuses_bad_input_in_one_line_before_installing_anything(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "demo", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("demo: ")
    assert done.stderr.count("\n") == 1


def test_two_steps_on_the_newest_release_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import bootstrap

    tree = bootstrap.ensure_release(bootstrap.NEWEST)
    picture = tmp_path / "picture.png"
    options = ["--megatron", str(tree), "--steps", "2", "--seeds", "1", "--json", "--out", str(tmp_path)]
    done = _command(*options, "--picture", str(picture), timeout=300)
    assert done.returncode == 0, done.stderr
    (figures,) = json.loads(done.stdout)["releases"]
    assert figures["megatron"] == bootstrap.NEWEST
    (off,), (on,) = figures["off"], figures["on"]
    assert set(off) == set(on)
    assert off["dtypes"]["local_tokens_per_expert"] == ["bfloat16", "bfloat16"]
    assert off["count_error"] > 0
    # The step itself is rounded there (D7): no update is exact.
    assert off["updates"]["exact"] == 0 < off["updates"]["wrong_size"]
    assert off["step"] == pytest.approx(float(torch.tensor(RATE).bfloat16()), rel=1e-4)
    assert on["updates"]["wrong"] == 0 < on["updates"]["exact"]
    assert on["count_error"] == 0
    assert not demo_report.low_tensors([on])
    assert picture.exists()
    assert (tmp_path / "demo.html").exists()
