"""Several ranks, as processes: every rank ends with the same bias bits, and they are those of integers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_fp32_router import lab

PROGRAMS = Path(__file__).resolve().parents[1] / "programs"
sys.path.append(str(PROGRAMS))

import megatron_ranks  # noqa: E402 - the folder is no package

# What is asked here is alike on the lines in between.
pytestmark = pytest.mark.on_lines("0.11", "0.14", "0.16", "0.19")

#: Few, since processes are dear: between them a layer is shared by two and by four ranks (one is tested below).
LAYOUTS = {
    "DP=4 with EP=2": {"data_parallel": 4, "expert_parallel": 2, "optimizer": "distributed"},
    "TP=2 with sequence parallelism": {"tensor_parallel": 2},
    "PP=2 with two chunks a rank, DP=2": {
        "pipeline_parallel": 2,
        "virtual_pipeline": 2,
        "data_parallel": 2,
        "layers": 4,
    },
}
START, RATE = 0.75, 1e-3

#: Tokens per expert and step over all ranks: what floating point gets wrong. bf16 in the first two (the mean is
#: 40,960), fp32 in the third (sums beyond 2^24), in the last nothing may move.
TOTALS = np.array(
    [
        [40840, 40977, 40977, 40977, 40977, 40977, 40977, 40978],
        [41080, 40943, 40943, 40943, 40943, 40943, 40943, 40942],
        2**26 + np.array([1, -1, 2, -2, 3, -3, 0, 0]),
        np.full(8, 40961),
    ],
    dtype=np.int64,
)


def integers(steps: Any, start: float = START) -> np.ndarray:
    """fp32 bias after `steps` of counts: signs from integers, one fp32 addition a step."""
    bias = np.full(len(steps[0]), start, dtype=np.float32)
    for counts in steps:
        bias = bias + np.sign(counts.sum() - len(counts) * counts).astype(np.float32) * np.float32(RATE)
    return bias


def of_layer(number: int) -> np.ndarray:
    return integers([np.roll(counts, number) for counts in TOTALS])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_rank_ends_with_the_bias_that_integers_give_however_the_counts_are_split(
    layout: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    recipe = lab.Recipe(**{"bias_start": START, "seq_length": 128, **layout})
    # Where input gradients are summed over ranks, and where weights are gathered while the forward runs.
    split = recipe.uses_sequence_parallel or recipe.optimizer == "distributed"
    ranks = lab.run_ranks(
        "megatron_ranks:train",
        recipe,
        {"totals": torch.from_numpy(TOTALS), "split_products": split},
        megatron=request.config.getoption("--megatron"),
        plugin=True,
        logs=tmp_path,
        python_path=[PROGRAMS],
    )
    printed = [line for log in tmp_path.iterdir() for line in log.read_text().splitlines()]
    assert sum(f"all {recipe.world_size} ranks on 1 host agree: " in line for line in printed) == 1
    lines = [line for line in printed if "(protect=all)" in line]
    assert len(lines) == (recipe.virtual_pipeline or 1), lines  # rank 0 speaks, once a model chunk, nobody else
    layers: dict[int, list[dict[str, Any]]] = {}
    for result in ranks:
        for found in result.values():
            layers.setdefault(found["layer"], []).append(found)
    assert sorted(layers) == list(range(1, recipe.layers + 1))
    sharing = recipe.tensor_parallel * recipe.data_parallel
    for number, copies in layers.items():
        assert len(copies) == sharing
        trained = integers(sum(found["counts"].double().numpy().astype(np.int64) for found in copies))
        assert (trained != np.float32(START)).any()
        for found in copies:
            if recipe.pipeline_parallel == 1:
                assert found["reduced"].tolist() == [sharing * (sharing + 1) / 2] * recipe.experts
            assert found["weight"].dtype == torch.float32
            assert torch.equal(found["weight"], copies[0]["weight"])
            assert len(found["fresh"]) >= (2 * recipe.layers if split else 0)
            assert all(found["fresh"])
            assert (found["bias"].numpy() == trained).all()
            assert (found["split"].numpy() == of_layer(number)).all()


@pytest.mark.repairs("D6")
def test_one_rank_ends_with_the_same_bias(build: Any, plugin: Any) -> None:
    room = build(bias_start=START)
    biases = megatron_ranks.split(room, torch.from_numpy(TOTALS))
    for name, router in room.routers():
        assert (biases[name].numpy() == of_layer(router.layer_number)).all()


@pytest.mark.shows("D6")
def test_without_the_plugin_the_bias_is_not_that_of_integers(build: Any) -> None:
    room = build(bias_start=0.0)  # where every update takes effect, whatever the bias' type
    biases = megatron_ranks.split(room, torch.from_numpy(TOTALS))
    for name, router in room.routers():
        expected = integers([np.roll(counts, router.layer_number) for counts in TOTALS], start=0.0)
        assert (np.abs(biases[name].double().numpy() - expected) > RATE / 2).any()
