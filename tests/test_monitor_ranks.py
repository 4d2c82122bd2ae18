"""The monitor in real trainings of several ranks, on the oldest and the newest release."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import bootstrap
import numpy as np
import pytest

from megatron_fp32_router import lab
from megatron_fp32_router.monitor import collect, page, runs

PROGRAMS = Path(__file__).parent / "programs"
EDGES = [bootstrap.RELEASES[0], bootstrap.NEWEST]


def run(release: str, folder: Path, recipe: lab.Recipe, *, env: dict[str, str] | None = None, **arguments: Any) -> Any:
    """Train every rank, with a look every second step; what the ranks dumped."""
    return lab.run_ranks(
        "monitor_ranks:train",
        recipe,
        arguments,
        megatron=bootstrap.ensure_release(release),
        plugin=True,
        env={"MEGATRON_FP32_ROUTER_MONITOR": "2", "MEGATRON_FP32_ROUTER_MONITOR_DIR": str(folder), **(env or {})},
        python_path=[PROGRAMS],
        logs=folder,
    )


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "monitor.jsonl").read_text().splitlines()]


def bf16(values: np.ndarray) -> np.ndarray:
    """fp32 rounded to bf16, to nearest and ties to even, by its bits."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def tf32(values: np.ndarray) -> np.ndarray:
    """Rounded to 10 bits of mantissa, to nearest and ties to even: fp64 is wide enough to round in."""
    fraction, exponent = np.frexp(values.astype(np.float64))
    return np.ldexp(np.rint(fraction * 2.0**11) / 2.0**11, exponent)


def chosen(scores: np.ndarray, topk: int) -> np.ndarray:
    """Whom each token goes to, bool; of equal scores the lower expert wins."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :topk]
    mask = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(mask, order, True, axis=1)
    return mask


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


@pytest.mark.parametrize("release", EDGES)
def test_two_pipeline_ranks_make_one_report_and_its_numbers_are_those_of_numpy(release: str, tmp_path: Path) -> None:
    chunks = 2 if release == bootstrap.NEWEST else None
    recipe = lab.Recipe(pipeline_parallel=2, virtual_pipeline=chunks, layers=4, bias_start=0.6, recompute=True)
    ranks = run(release, tmp_path, recipe, steps=6)
    dumped = {layer: steps for rank in ranks for layer, steps in rank["dumped"].items()}
    assert sorted(dumped) == [1, 2, 3, 4]

    found = records(tmp_path)
    means: dict[int, float] = {}
    assert [(record["step"], record["layer"]) for record in found] == [
        (step, layer) for step in (2, 4, 6) for layer in (1, 2, 3, 4, "all")
    ]
    for record in found:
        assert record["violations"] == []
        metrics = record["metrics"]
        if record["layer"] == "all":
            each = [r["metrics"]["load/max_vio"] for r in found if r["step"] == record["step"] and r["layer"] != "all"]
            assert metrics["load/max_vio/mean"] == pytest.approx(np.mean(each))
            assert metrics["load/max_vio/p90"] == pytest.approx(np.percentile(each, 90))
            continue
        seen = dumped[record["layer"]][record["step"]]
        counts = seen["counts"].numpy().astype(np.int64)
        assert metrics["load/assignments"] == counts.sum() == recipe.tokens_per_step * recipe.topk
        assert metrics["load/max_vio"] == pytest.approx(counts.max() / counts.mean() - 1)
        assert metrics["load/cv"] == pytest.approx(counts.std() / counts.mean())
        assert metrics["load/min_vio"] == pytest.approx(counts.min() / counts.mean() - 1)
        assert metrics["load/avg_vio"] == pytest.approx(np.abs(counts / counts.mean() - 1).mean())
        shares = counts[counts > 0] / counts.sum()
        assert metrics["load/diversity"] == pytest.approx(np.prod(shares**-shares) / recipe.experts)
        assert metrics["load/dead_experts"] == (counts == 0).sum()
        bias = seen["bias"].numpy()
        step = np.sign(counts.sum() - recipe.experts * counts).astype(np.float32)
        after = bias + step * np.float32(1e-3)
        assert metrics["bias/mean"] == pytest.approx(after.astype(np.float64).mean(), abs=1e-12)
        assert metrics["bias/spread"] == pytest.approx(float(after.max()) - float(after.min()), abs=1e-12)
        last = means.get(record["layer"])
        means[record["layer"]] = after.astype(np.float64).mean()
        if last is None:
            assert "bias/drift_per_step" not in metrics
        else:
            drift = (means[record["layer"]] - last) / 2
            assert metrics["bias/drift_per_step"] == pytest.approx(drift, abs=1e-12)
        assert (metrics["update/swallowed"], metrics["update/inexact"]) == (0, 0)
        # The bias is above 0.5: bf16 would have swallowed the lot, fp16 nothing.
        assert (metrics["update/swallowed_bf16"], metrics["update/swallowed_fp16"]) == (1, 0)

        hidden, weight = seen["hidden"].numpy().astype(np.float64), seen["weight"].numpy()
        logits = hidden @ weight.T.astype(np.float64)
        reference = chosen(sigmoid(logits) + bias, recipe.topk)
        others = {
            "bf16_weight": sigmoid(hidden @ bf16(weight).T.astype(np.float64)) + bias,
            "bf16_logits": sigmoid(bf16(logits)) + bias,
            "bf16_scores": bf16(sigmoid(logits)).astype(np.float64) + bias,
            "bf16_bias": sigmoid(logits) + bf16(bias),
            "tf32": sigmoid(tf32(hidden) @ tf32(weight).T) + bias,
        }
        best = -np.sort(-(sigmoid(logits) + bias), axis=1)
        margins = best[:, recipe.topk - 1] - best[:, recipe.topk]
        for name, part in (("p01", 0.01), ("p10", 0.1), ("p50", 0.5)):
            # fp32 scores are 6e-8 apart here.
            assert metrics[f"margin/{name}"] == pytest.approx(np.quantile(margins, part), abs=3e-7)
        assert metrics["sample/tokens"] == len(hidden)
        for name, scores in others.items():
            flips = (chosen(scores.astype(np.float32), recipe.topk) != reference).any(axis=1).mean()
            # fp32 and fp64 logits may round to different neighbours in bf16 once in a while: one token.
            assert metrics[f"flips/{name}"] == pytest.approx(flips, abs=1.01 / len(hidden))
            assert metrics[f"flips/{name}"] <= metrics[f"at_risk/{name}"]
        assert metrics["flips/actual"] == 0
    assert sum(record["metrics"].get("flips/bf16_bias", 0) for record in found) > 0

    read = runs.read(tmp_path)
    text = page.render(read, runs.findings(read))
    for layer in (1, 2, 3, 4):
        assert f">{layer}</th>" in text
    for title in ("Load: MaxVio of every layer", "Drift of the expert biases", "Flips with a bf16 weight, every layer"):
        assert title in text


def test_without_expert_biases_two_data_parallel_ranks_are_counted_together(tmp_path: Path) -> None:
    recipe = lab.Recipe(data_parallel=2, expert_bias=False, load_balancing="aux_loss", score_function="softmax")
    ranks = run(bootstrap.NEWEST, tmp_path, recipe, steps=4)
    for record in records(tmp_path):
        if record["layer"] == "all":
            continue
        counts = sum(rank["dumped"][record["layer"]][record["step"]]["counts"].numpy() for rank in ranks)
        assert record["metrics"]["load/assignments"] == counts.sum() == recipe.tokens_per_step * recipe.topk
        assert record["metrics"]["load/max_vio"] == pytest.approx(counts.max() / counts.mean() - 1)
        assert not any(name.startswith(("bias/", "update/")) for name in record["metrics"])


@pytest.mark.parametrize(
    ("recipe", "cast_on", "raised_by", "told"),
    [
        (lab.Recipe(pipeline_parallel=2), 1, [0, 1], ""),
        (
            lab.Recipe(data_parallel=2, expert_bias=False, load_balancing="aux_loss", score_function="softmax"),
            1,
            [0, 1],
            " (rank 1)",
        ),
        # The other one is in the all-reduce of the balance update by then, and must not be waited for.
        (lab.Recipe(data_parallel=2), 0, [0], ""),
    ],
    ids=["another stage", "another replica", "rank 0 itself"],
)
def test_a_router_that_one_rank_casts_stops_the_job_at_the_next_look_by_its_name(
    recipe: lab.Recipe, cast_on: int, raised_by: list[int], told: str, tmp_path: Path
) -> None:
    started = time.monotonic()
    with pytest.raises(lab.RankFailedError) as raised:
        run(bootstrap.NEWEST, tmp_path, recipe, steps=9, cast_after=4, cast_on=cast_on)
    assert time.monotonic() - started < collect.PATIENCE
    assert raised.value.kind == "megatron_fp32_router.errors.UnprotectedRouterError"
    number = 0 if recipe.pipeline_parallel == 2 else 1
    wanted = (
        f"layer 2, module.module.decoder.layers.{number}.mlp.router: weight is bfloat16; it was float32 2 steps before"
    )
    assert [rank for rank, text in sorted(raised.value.tracebacks.items()) if wanted in text] == raised_by
    found = records(tmp_path)[-1]
    assert (found["step"], found["layer"]) == (4, "all")
    (text,) = found["violations"]
    assert text.endswith(f"weight is bfloat16; it was float32 2 steps before{told}")
