"""Several ranks, as processes: every rank ends with the same bias bits, and they are those of integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_fp32_router import lab

LAYOUTS = {
    "DP=2": {"data_parallel": 2, "optimizer": "distributed"},
    "TP=2 with sequence parallelism": {"tensor_parallel": 2},
    "PP=2": {"pipeline_parallel": 2},
    "EP=2": {"data_parallel": 2, "expert_parallel": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_rank_ends_with_the_bias_that_integers_give(
    layout: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    recipe = lab.Recipe(bias_start=0.75, seq_length=128, **layout)
    ranks = lab.run_ranks(
        "megatron_ranks:train",
        recipe,
        {"split": recipe.uses_sequence_parallel},
        megatron=request.config.getoption("--megatron"),
        plugin=True,
        logs=tmp_path,
        python_path=[str(request.config.rootpath / "tests" / "programs")],
    )
    lines = [line for log in tmp_path.iterdir() for line in log.read_text().splitlines() if "(protect=all)" in line]
    assert len(lines) == 1, lines  # rank 0 speaks, nobody else
    layers: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for rank, result in enumerate(ranks):
        for name, found in result.items():
            layers.setdefault((rank if recipe.pipeline_parallel > 1 else 0, name), []).append(found)
    assert len(layers) == recipe.layers
    for copies in layers.values():
        counts = sum(found["counts"].double().numpy().astype(np.int64) for found in copies)
        bias = np.full(recipe.experts, 0.75, dtype=np.float32)
        for step in counts:
            bias = bias + np.sign(step.sum() - recipe.experts * step).astype(np.float32) * np.float32(1e-3)
        for found in copies:
            if recipe.pipeline_parallel == 1:
                assert found["reduced"].tolist() == [3.0] * recipe.experts
            assert found["weight"] == "torch.float32"
            assert (found["bias"].numpy() == bias).all()
