"""Not finite, uneven and not fp32 are three different findings, and only the last one stops a training."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_fp32_router
from megatron_fp32_router import lab, monitor
from megatron_fp32_router.monitor import runs

pytestmark = pytest.mark.on_lines("0.11", "0.19")

TINY: dict[str, Any] = {"hidden": 32, "heads": 2, "moe_ffn": 32, "seq_length": 32, "micro_batches": 1}


def train(
    spoil: Callable[[Any], None], build: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, *, after: bool = True
) -> tuple[str, runs.Run]:
    """Four steps with a look every second one, under `raise`; what stopped them, and the report.

    `spoil` is given the second layer's router in step 4, `after` its backward pass or before its forward.
    """
    monkeypatch.setenv("MEGATRON_FP32_ROUTER_MONITOR", "2")
    monkeypatch.setenv("MEGATRON_FP32_ROUTER_MONITOR_DIR", str(folder))
    megatron_fp32_router.disable()
    megatron_fp32_router.enable()
    stopped = ""
    try:
        room = build(**TINY)
        batches = lab.text_batches(room.recipe, seed=1)
        for _ in range(3):
            room.step(batches)
        _, router = room.routers()[1]
        if after:
            room.on_counts.append(lambda _: spoil(router))
        else:
            spoil(router)
        room.step(batches)
    except megatron_fp32_router.UnprotectedRouterError as error:
        stopped = str(error)
    finally:
        megatron_fp32_router.disable()
    return stopped, runs.read(folder)


def problems(run: runs.Run) -> list[str]:
    return [finding.text for finding in runs.findings(run) if finding.problem]


def _nan_in_the_weight(router: Any) -> None:
    router.weight.data[1, :3] = math.nan


def _infinity_in_the_bias(router: Any) -> None:
    router.expert_bias[1] = math.inf


def _nan_in_what_the_update_reads(router: Any) -> None:
    router.expert_bias[1] = math.nan


@pytest.mark.parametrize(
    ("spoil", "name", "values"),
    [
        (_nan_in_the_weight, "weight", 3),
        (_infinity_in_the_bias, "expert_bias", 1),
        (_nan_in_what_the_update_reads, "expert_bias", 1),
    ],
)
def test_a_value_that_is_not_finite_is_named_with_its_layer_and_step_and_stops_nothing(
    spoil: Any,
    name: str,
    values: int,
    build: Any,
    expert_layers: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second = expert_layers
    stopped, run = train(spoil, build, tmp_path, monkeypatch)
    assert stopped == ""
    assert problems(run) == [f"layer {second}: {name} is not finite, at step 4"]
    assert run.last(f"not_finite/{name}") == {first: 0, second: values}
    which = f"layer {second}, {name}: {values}"
    said = f"the monitor found values that are not finite, since step 4: {which}; nothing is stopped"
    assert caplog.text.count(said) == 1
    assert "no longer in fp32" not in caplog.text
    # What such numbers would choose says nothing; what is counted does.
    assert second not in run.last("flips/bf16_weight")
    assert second in run.last("load/max_vio")
    assert (second in run.last("precision/arithmetic_bits")) == (name != "weight")


def test_a_layer_that_has_diverged_is_uneven_and_its_arithmetic_is_not_doubted(
    build: Any, expert_layers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(router: Any) -> None:
        router.weight.data.mul_(1e5)  # every score is 0 or 1: most choices are between equals
        router.expert_bias.zero_()
        router.expert_bias[0] = 10

    first, second = expert_layers
    stopped, run = train(diverge, build, tmp_path, monkeypatch, after=False)
    assert stopped == ""
    assert run.last("margin/p50")[second] == 0
    texts = [finding.text for finding in runs.findings(run)]
    assert any(f"the busiest expert gets 4.00 times its fair share in layer {second}" in text for text in texts)
    assert not any(word in text for text in texts for word in ("not finite", "significant bits", "chose other experts"))
    assert run.last("precision/arithmetic_bits") == {first: 24, second: 24}
    assert run.violations == {}


def test_a_cast_to_bf16_is_no_longer_fp32_and_stops_the_training(
    build: Any, expert_layers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cast(router: Any) -> None:
        router.weight.data = router.weight.data.bfloat16()

    stopped, run = train(cast, build, tmp_path, monkeypatch)
    second = expert_layers[1]
    name = f"module.module.decoder.layers.{second - 1}.mlp.router"
    assert f"no longer in fp32: layer {second}, {name}: weight is bfloat16" in stopped
    assert problems(run) == [f"layer {second}: {name}: weight is bfloat16, at step 4"]


def test_a_choice_that_no_fp32_arithmetic_makes_is_still_a_wrong_one(
    build: Any, expert_layers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def round_logits(router: Any) -> None:
        routing = router.routing

        def coarse(logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return routing(logits + ((logits * 64).round() / 64 - logits).detach(), *args, **kwargs)

        monkeypatch.setattr(router, "routing", coarse)

    _, run = train(round_logits, build, tmp_path, monkeypatch, after=False)
    first, second = expert_layers
    assert run.last("flips/actual")[first] == 0 < run.last("flips/actual")[second]
    assert any("the router chose other experts than fp32 arithmetic does" in text for text in problems(run))


def test_a_loop_of_ones_own_is_told_of_infinity_and_not_stopped_by_it(router: Any, plugin: Any) -> None:
    r = router()
    r.expert_bias[0] = math.inf
    r.weight.data[0, 0] = math.nan
    with monitor.listening(r):
        r(torch.full((4, 2, 64), math.inf, dtype=torch.bfloat16))
    found = monitor.metrics(r)
    counts = {name: found[f"layer_1/not_finite/{name}"] for name in ("weight", "expert_bias", "input")}
    assert counts == {"weight": 1, "expert_bias": 1, "input": 512}
    assert found["violations"] == 0
    assert all(math.isfinite(value) for value in found.values())
    # Such tokens are no probe: what they are compared with would say nothing at any later look.
    r.expert_bias[0], r.weight.data[0, 0] = 0.0, 0.0
    for look in range(3):
        with monitor.listening(r):
            r(torch.randn(4, 2, 64, dtype=torch.bfloat16))
        found = monitor.metrics(r)
        assert found["layer_1/sample/tokens"] == 8
        assert ("layer_1/probe/changed" in found) == (look > 0)
