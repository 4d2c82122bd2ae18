"""docs/study.md matches the results of scripts/study, these are right, and the script continues where it stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bootstrap import NEWEST, ensure_release
from installing import ROOT, clean_environment
from studies import page, pictures, simulation, training

TRAININGS, SIMULATIONS = page.load()


def test_the_page_and_its_pictures_are_those_that_the_files_give() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.render(TRAININGS, SIMULATIONS), "run scripts/study --page"
    for name, results in (("training", TRAININGS), ("simulation", SIMULATIONS)):
        assert pictures.digest(results).encode() in (page.RESULTS / f"{name}.png").read_bytes(), "scripts/study --page"


def test_the_files_hold_the_whole_study() -> None:
    assert len(TRAININGS) == len(training.runs()) == 60
    assert len(SIMULATIONS) == 9
    assert {run["settings"] for run in TRAININGS} == {training.settings_name()}
    assert {run["steps"] for run in TRAININGS} == {training.STEPS}


def _load(release: str, start: float, plugin: bool) -> float:
    found = [
        run["max_vio_end"]
        for run in TRAININGS
        if (run["release"], run["start"], run["plugin"]) == (release, start, plugin)
    ]
    return sum(found) / len(found)


def test_the_figures_in_readme_are_those_of_the_files() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    off, on = ([_load("0.11.0", start, plugin) for start in (0.75, 0)] for plugin in (False, True))
    assert (
        f"the load violation of 0.11 falls from {off[0]:.1f} to {on[0]:.1f} (biases from 0.75) and from "
        f"{off[1]:.1f} to {on[1]:.1f} (from 0)"
    ) in readme
    rows = [row for cell in SIMULATIONS for row in cell["rows"] if row["ranks"] == 4096]
    tree, ring = ([100 * row[how][0] for row in rows] for how in ("tree", "ring"))
    assert (
        f"Simulated for 4,096 ranks, bf16 gives {min(tree):.0f} to {max(tree):.0f} % of the updates a wrong sign when "
        f"counts are added in a tree, and {min(ring):.0f} to {max(ring):.0f} % in a ring."
    ) in readme


def test_with_the_plugin_no_update_in_the_files_is_wrong() -> None:
    for run in TRAININGS:
        if run["plugin"]:
            kinds = ("swallowed", "reversed", "unasked", "wrong_size", "count_error")
            assert {kind: run[kind] for kind in kinds} == dict.fromkeys(kinds, 0), run


COUNTS_SLE = np.array([[[6, 2, 4]], [[4, 4, 4]]])
RATE = 1e-3


@pytest.mark.parametrize(
    ("first", "second", "wrong"),
    [
        ((0.749, 0.751, 0.75), (0.749, 0.751, 0.75), {}),
        ((0.75, 0.751, 0.75), (0.75, 0.751, 0.75), {"swallowed": 1}),
        ((0.751, 0.751, 0.75), (0.751, 0.751, 0.75), {"reversed": 1}),
        ((0.749, 0.751, 0.751), (0.749, 0.751, 0.751), {"unasked": 1}),
        # D7: half a thousandth of the rate, ten times fp32's spacing there.
        ((0.75 - 0.00099945, 0.751, 0.75), (0.75 - 0.00099945, 0.751, 0.75), {"wrong_size": 1}),
    ],
)
def test_every_kind_of_wrong_update_is_counted_as_what_it_is(
    first: tuple[float, ...], second: tuple[float, ...], wrong: dict[str, int]
) -> None:
    bias_SLE = np.array([[[0.75] * 3], [first], [second]]).astype(np.float32).astype(np.float64)
    found = training.compared_with_rule(bias_SLE, COUNTS_SLE, RATE)
    assert found["due"] == 2
    for kind in ("swallowed", "reversed", "unasked", "wrong_size"):
        assert found[kind] == wrong.get(kind, 0), kind


def bf16(value: Fraction) -> Fraction:
    """The nearest number of 8 significant bits, halves to even: fractions, no floating point."""
    if value == 0:
        return value
    spacing = Fraction(1)
    while value / spacing >= 256:
        spacing *= 2
    while value / spacing < 128:
        spacing /= 2
    return round(value / spacing) * spacing


def _pairs(values: list[Fraction]) -> Fraction:
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    return bf16(_pairs(values[:half]) + _pairs(values[half:]))


def test_sums_are_rounded_as_bf16_is_in_a_ring_and_in_a_tree() -> None:
    counts = np.random.default_rng(1).integers(200, 2000, 64)
    tree, ring = simulation.Tree(), torch.zeros(1, dtype=torch.bfloat16)
    for count in counts:
        local = torch.tensor([int(count)]).bfloat16()
        tree.add(local)
        ring += local
    rounded = [bf16(Fraction(int(count))) for count in counts]
    chained = Fraction(0)
    for value in rounded:
        chained = bf16(chained + value)
    assert float(tree.total()) == float(_pairs(rounded))
    assert float(ring) == float(chained) != float(_pairs(rounded))


def test_a_tree_of_any_number_of_ranks_adds_each_of_them_once() -> None:
    for ranks in range(1, 20):
        tree = simulation.Tree()
        for rank in range(ranks):
            tree.add(torch.tensor([2.0**rank], dtype=torch.float64))
        assert float(tree.total()) == 2.0**ranks - 1


def _study(folder: Path, only: str) -> subprocess.CompletedProcess[str]:
    """One release of it, a few steps."""
    trees = f"{NEWEST}={ensure_release(NEWEST)}"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "studies", "--quick", "--out", folder, "--only", only, "--trees", trees],
        cwd=ROOT,
        env=clean_environment(ROOT, ROOT / "scripts", OMP_NUM_THREADS="1", MEGATRON_FP32_ROUTER="0"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_few_steps_run_and_finished_runs_are_not_repeated(tmp_path: Path) -> None:
    def result(seed: int) -> Path:
        return tmp_path / "training" / f"{NEWEST}-on-0-seed{seed}.json"

    done = _study(tmp_path, f"{NEWEST}-on-0-seed2")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(result(2).read_text(encoding="utf-8"))
    assert (found["release"], found["plugin"], found["steps"]) == (NEWEST, True, 3)
    assert found["due"] > 150
    assert (found["swallowed"], found["reversed"], found["wrong_size"], found["count_error"]) == (0, 0, 0, 0)
    os.utime(result(2), (1, 1))
    done = _study(tmp_path, f"{NEWEST}-on-0-seed")
    assert done.returncode == 0, done.stderr
    assert "1 of 2 trainings are there" in done.stderr
    assert result(1).exists()
    assert result(2).stat().st_mtime == 1
    # A result of other settings is neither used nor overwritten.
    result(2).write_text(json.dumps(found | {"steps": 4}), encoding="utf-8")
    done = _study(tmp_path, f"{NEWEST}-on-0-seed2")
    assert done.returncode == 1
    assert "Delete it, or name another folder with --out." in done.stderr


def test_a_simulation_of_a_few_draws_is_the_same_twice() -> None:
    one, two = (simulation.simulate(64, 0.05, drawn=20_000, ranks=(1, 8), report=str) for _ in range(2))
    assert one == two
    assert [row["ranks"] for row in one["rows"]] == [1, 8]
    assert 0 < one["rows"][0]["once"][0] < 0.5
