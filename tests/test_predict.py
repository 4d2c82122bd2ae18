"""`megatron-fp32-router predict`: is a run affected?"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from megatron_fp32_router.cli import main
from megatron_fp32_router.serving.predict import PredictionError, Run, simulate, swallowed_from

#: The laboratory's run: two layers of eight experts, top-2, four micro-batches of 1,024 tokens on one rank.
LAB: dict[str, Any] = {"experts": 8, "topk": 2, "tokens": 4096, "ranks": 1, "micro_batches": 4, "layers": 2}


def test_the_bias_of_0_11_is_stuck_at_three_quarters() -> None:
    share = simulate(Run(release="0.11.0", bias=0.75, **LAB), 0.3)
    # Measured: none of 40 moved. bf16's spacing at 0.75 is four times the rate, both ways.
    assert share.not_made > 0.998  # the rest need none
    below = simulate(Run(release="0.11.0", bias=0.5, **LAB), 0.3)
    # Down it goes, to where the spacing is half as large, by twice the rate; up never.
    assert below.not_made == pytest.approx(0.5, abs=0.05)
    assert below.wrong_size == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("release", ["0.12.3", "0.16.1", "0.19.2"])
def test_an_fp32_bias_with_a_bf16_counter_loses_about_one_update_in_two_hundred(release: str) -> None:
    # Measured in the laboratory: 123 of 23,058 wrong or stuck, with loads between 0.3 and 0.6 apart.
    for spread in (0.3, 0.6):
        assert 0.002 < simulate(Run(release=release, bias=0.75, **LAB), spread).wrong < 0.012


def test_closer_loads_and_more_ranks_make_more_updates_wrong() -> None:
    run = Run()
    shares = [simulate(run, spread).wrong for spread in (0.01, 0.05, 0.2)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.3
    few = simulate(Run(tokens=1 << 16, ranks=1, release="0.16.1", experts=8, topk=2), 0.05).wrong_way
    many = simulate(Run(tokens=1 << 16, ranks=256, release="0.16.1", experts=8, topk=2), 0.05).wrong_way
    assert many > few


def test_counts_that_bf16_holds_make_none_wrong() -> None:
    assert simulate(Run(tokens=256, ranks=1, experts=8, topk=2, release="0.16.1"), 0.2).wrong == 0


@pytest.mark.parametrize(
    ("rate", "precision", "bias_dtype", "limit"),
    [(1e-3, "bfloat16", "bfloat16", 0.5), (1e-4, "bfloat16", "bfloat16", 2**-5), (1e-3, "bfloat16", "float32", 2**15)],
)
def test_where_a_bias_takes_no_step_any_more(rate: float, precision: str, bias_dtype: str, limit: float) -> None:
    found, steps = swallowed_from(rate, precision, bias_dtype)
    assert found == limit
    # Below, some ranges make steps larger than the rate, none smaller by more than half.
    assert 0.5 * limit / rate < steps < 1.5 * limit / rate


def test_the_same_seed_gives_the_same_answer() -> None:
    assert simulate(Run(seed=3), 0.05) == simulate(Run(seed=3), 0.05) != simulate(Run(seed=4), 0.05)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"release": "0.20.0"}, "from 0.11 to 0.19, found 0.20.0"),
        ({"release": "main"}, "found main"),
        ({"topk": 256}, "topk below the 256 experts"),
        ({"ranks": 0}, "ranks of at least 1, found 0"),
        ({"tokens": 1000}, "tokens that 64 ranks x 1 micro-batches divide, found 1000"),
    ],
)
def test_a_run_that_is_none_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(PredictionError, match=says):
        Run(**fields)


def test_the_command_says_it_and_its_exit_code_is_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--release", "0.11.0", "--spread", "0.05"]) == 1
    said = capsys.readouterr().out
    assert "Megatron 0.11.0 without this plugin, bfloat16; expert_bias is bfloat16" in said
    assert "from a bias of 0.5 on, an update of 0.001 away from zero changes nothing" in said
    assert "seed 0" in said
    small = ["--tokens", "256", "--ranks", "1", "--experts", "8", "--topk", "2", "--json"]
    assert main(["predict", *small]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [share["wrong"] for share in found["shares"]] == [0, 0, 0]
    assert found["run"]["experts"] == 8
    assert main(["predict", "--release", "1.0"]) == 2
    assert "found 1.0" in capsys.readouterr().err


def test_fp16_counts_that_overflow_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--precision", "fp16", "--spread", "0.05"]) == 1
    said = capsys.readouterr().out
    assert "infinite: nothing is balanced any more" in said
    assert "100.0%" in said


def test_another_command_imports_nothing_about_serving() -> None:
    program = (
        "import sys; from megatron_fp32_router import cli; cli._parser(with_demo=False); "
        "print([name for name in sys.modules if name.startswith('megatron_fp32_router.serving')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
