"""The demo: what it decides, what it prints, and that the page it writes loads nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_fp32_router.lab import demo, demo_page, demo_report
from megatron_fp32_router.lab.demo_run import judge

ROOT = Path(__file__).resolve().parent.parent
RATE = 1e-3

#: Enough for two steps of one layer and two experts.
COUNTS_SLE = np.array([[[6, 2]], [[4, 4]]])


def _biases(*steps: tuple[float, float]) -> np.ndarray[Any, Any]:
    return np.array([[step] for step in steps])


def _run(good: bool) -> dict[str, Any]:
    right = _biases((0.75, 0.75), (0.749, 0.751), (0.749, 0.751))
    stuck = _biases((0.75, 0.75), (0.75, 0.75), (0.75, 0.75))
    judged = judge(right if good else stuck, COUNTS_SLE, RATE)
    judged["series"] |= {"layers": ["layer.0.router"], "max_vio": [0.5, 0.0], "count_error": [0.0, 0.0]}
    dtype = "float32" if good else "bfloat16"
    return {
        "dtypes": {"weight": [dtype, dtype], "expert_bias": ["bfloat16" if not good else dtype, "float32"]},
        **judged,
        "count_error": 0.0 if good else 18.0,
        "max_vio": 0.25,
        "disagree": 0.0,
        "tokens_compared": 8,
        "reference_weight": "the <fp32> weight",
        "loss": 2.5,
        "seconds": 1.0,
    }


def _data(on_is_good: bool = True) -> dict[str, Any]:
    return {
        "megatron": "0.11.0",
        "torch": "2",
        "python": "3",
        "plugin": "0",
        "steps": 2,
        "recipe": demo.recipe_for_demo().to_json(),
        "choices": [["what", "why"]],
        "off": _run(good=False),
        "on": _run(good=on_is_good),
    }


def test_an_update_that_is_rounded_away_is_counted_as_swallowed() -> None:
    updates = _run(good=False)["updates"]
    assert (updates["expected"], updates["moved"], updates["stuck"], updates["wrong"]) == (2, 0, 2, 2)


def test_exact_updates_are_all_right_and_a_balanced_expert_stays() -> None:
    updates = _run(good=True)["updates"]
    assert (updates["expected"], updates["moved"], updates["wrong"]) == (2, 2, 0)


def test_a_step_the_wrong_way_a_step_of_the_wrong_size_and_an_unasked_one_are_told_apart() -> None:
    backwards = judge(_biases((0.0, 0.0), (RATE, 2 * RATE), (0.0, 2 * RATE)), COUNTS_SLE, RATE)["updates"]
    assert (backwards["reversed"], backwards["wrong_size"], backwards["unasked"], backwards["wrong"]) == (
        1,
        1,
        1,
        3,
    )


class _Loads(HTMLParser):
    """Collects everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe", "object", "embed", "image"):
            self.found.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and value and not value.startswith("#"):
                self.found.append(value)


def test_the_page_loads_nothing() -> None:
    page = demo_page.render(_data())
    loads = _Loads()
    loads.feed(page)
    assert loads.found == []
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_the_page_has_distinct_ids_and_every_reference_has_its_target() -> None:
    page = demo_page.render(_data())
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', page)) <= set(ids)


def test_the_page_shows_every_row_of_the_table_and_escapes_what_it_is_given() -> None:
    data = _data()
    page = demo_page.render(data)
    for what, _, _ in demo_report.rows(data):
        assert what in page
    assert "&lt;fp32&gt;" in page
    assert "the <fp32> weight" not in page


def test_a_plugin_that_breaks_its_promise_is_not_called_good() -> None:
    data = _data(on_is_good=False)
    assert not demo_report.protected(data)
    assert "DID NOT KEEP ITS PROMISE" in demo_page.render(data)


def test_a_picture_of_one_run_and_one_of_two_can_be_drawn(tmp_path: Path) -> None:
    miscounting = _data() | {"off": _run(good=True)}
    for several in ([_data()], [_data(), miscounting]):
        path = tmp_path / "new folder" / f"{len(several)}.png"
        demo_page.picture(several, path)
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
    assert done.stderr == f"demo: --megatron {tmp_path}: there is no megatron/core in it\n"


@pytest.mark.parametrize("steps", ["0", "-3", "many", "1.5"])
def test_a_number_of_steps_that_is_none_is_refused_in_one_line(empty_tree: Path, steps: str) -> None:
    done = _command("--megatron", str(empty_tree), f"--steps={steps}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"demo: --steps {steps}: expected a whole number of at least 1\n"


def test_an_output_folder_that_cannot_be_made_is_refused_in_one_line(empty_tree: Path) -> None:
    occupied = empty_tree / "file"
    occupied.touch()
    done = _command("--megatron", str(empty_tree), "--out", str(occupied))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--release", "9.9"], ["--steps", "0"], ["--bogus"]])
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


def test_three_steps_on_the_newest_release_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import bootstrap

    tree = bootstrap.ensure_release(bootstrap.NEWEST)
    picture = tmp_path / "picture.png"
    done = _command(
        *(
            "--megatron",
            str(tree),
            "--steps",
            "3",
            "--json",
            "--out",
            str(tmp_path),
            "--picture",
            str(picture),
        ),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["megatron"] == bootstrap.NEWEST
    assert set(figures["off"]) == set(figures["on"])
    assert figures["off"]["dtypes"]["local_tokens_per_expert"] == ["bfloat16", "bfloat16"]
    assert figures["off"]["count_error"] > 0
    on = figures["on"]
    assert on["updates"]["wrong"] == 0
    assert on["count_error"] == 0
    assert not demo_report.low_tensors(on)
    assert picture.exists()
    assert (tmp_path / f"demo-{bootstrap.NEWEST}.html").exists()
