"""The monitor's arithmetic against NumPy; no Megatron needed."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_fp32_router.errors import SettingsError
from megatron_fp32_router.monitor import bias, stability
from megatron_fp32_router.monitor.expert_load import expert_load
from megatron_fp32_router.settings import from_environment

# Load ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 10**7), min_size=2, max_size=64))
def test_load_is_what_numpy_says(counts: list[int]) -> None:
    found = expert_load(counts)
    values = np.array(counts, dtype=np.float64)
    if not values.sum():
        assert found == {}
        return
    shares = values[values > 0] / values.sum()
    assert found["load/max_vio"] == pytest.approx((values.max() - values.mean()) / values.mean(), abs=1e-12)
    assert found["load/min_vio"] == pytest.approx((values.min() - values.mean()) / values.mean(), abs=1e-12)
    assert found["load/avg_vio"] == pytest.approx(np.abs(values - values.mean()).mean() / values.mean(), abs=1e-12)
    assert found["load/cv"] == pytest.approx(values.std() / values.mean(), abs=1e-12)
    assert found["load/diversity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()) / len(values))
    assert found["load/dead_experts"] == (values == 0).sum()
    assert found["load/experts"] == len(values)


# Biases ----------------------------------------------------------------------------------------------------------


def test_a_bias_above_one_half_is_swallowed_by_bf16_and_one_above_four_by_fp16() -> None:
    counts = torch.tensor([1, 2, 3, 10])
    for start, bf16, fp16 in ((0.1, 0, 0), (0.75, 1, 0), (5.0, 1, 1)):
        before = torch.full((4,), start)
        step = torch.tensor([1.0, 1.0, 1.0, -1.0])
        found = bias.update(before, torch.add(before, step, alpha=1e-3), counts, 1e-3)
        assert (found["update/swallowed"], found["update/inexact"], found["update/reversed"]) == (0, 0, 0)
        assert (found["update/swallowed_bf16"], found["update/swallowed_fp16"]) == (bf16, fp16)
        assert found["update/gain"] == pytest.approx(1, abs=1e-3)
        assert found["update/vote_imbalance"] == 0.5


def test_updates_that_were_swallowed_reversed_or_of_the_wrong_size_are_told_apart() -> None:
    counts = torch.tensor([1, 1, 1, 9])
    before = torch.zeros(4)
    after = torch.tensor([0.0, -1e-3, 2e-3, -1e-3])  # due: up, up, up, down
    found = bias.update(before, after, counts, 1e-3)
    assert found["update/swallowed"] == 0.25
    assert found["update/reversed"] == 0.25
    assert found["update/inexact"] == 0.75
    assert found["update/gain"] == pytest.approx(1.0)


def test_where_all_loads_are_equal_nothing_is_due() -> None:
    found = bias.update(torch.zeros(4), torch.zeros(4), torch.full((4,), 7), 1e-3)
    assert found == {"update/vote_imbalance": 0, "update/due": 0}


def test_the_published_biases_of_a_drifted_model_leave_few_values_in_bf16() -> None:
    """GLM-5.2: biases in [6.817, 7.063], 238 distinct values of which bf16 leaves 8 or 9."""
    values = torch.linspace(6.817, 7.063, 238)
    found = bias.drift(values, None, 0)
    assert found["bias/distinct_fp32"] == 238
    assert found["bias/distinct_bf16"] == 9
    assert found["bias/spread_in_spacings_bf16"] == pytest.approx(0.246 / 2**-5, rel=1e-3)
    assert "bias/drift_per_step" not in found


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_steps_until_a_consumer_is_blind_are_right_when_they_have_passed(name: str, dtype: torch.dtype) -> None:
    start, per_step, spread = 1.0, 1e-3, 0.03
    values = torch.tensor([start, start + spread], dtype=torch.float64)
    left = bias.drift(values, float(values.mean()) - 100 * per_step, 100)[f"bias/steps_to_blind_{name}"]

    def distinct(steps: float) -> bool:
        moved = values + steps * per_step
        spacing = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(float(moved.max())))
        return spacing < float(moved.max() - moved.min())

    assert left > 0
    assert distinct(left * 0.999)
    assert not distinct(left * 1.001)


def test_a_bias_that_drifts_to_zero_or_not_at_all_never_makes_a_consumer_blind() -> None:
    values = torch.tensor([1.0, 1.03])
    for last in (None, 1.015, 1.1):
        assert "bias/steps_to_blind_bf16" not in bias.drift(values, last, 10)
    assert bias.steps_left(100.0, 100.0, 1e-3, None, torch.bfloat16) == 0


# Stability -------------------------------------------------------------------------------------------------------


def rule(
    experts: int, hidden: int, bias_E: torch.Tensor | None = None, **config: Any
) -> tuple[stability.Rule, torch.Tensor]:
    wanted = {
        "moe_router_num_groups": None,
        "moe_router_group_topk": None,
        "moe_router_pre_softmax": False,
        **config,
    }
    weight = torch.randn(experts, hidden, generator=torch.Generator().manual_seed(1)) * 0.02
    router = SimpleNamespace(config=SimpleNamespace(**wanted), topk=4, score_function="sigmoid", weight=weight)
    return stability.Rule(router, bias_E), weight


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 2**31), st.booleans())
@example(0, True)
@example(0, False)
def test_no_more_tokens_flip_than_are_at_risk(seed: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(300, 64, generator=generator).bfloat16()
    bias_E = 5 + 0.1 * torch.randn(32, generator=generator) if biased else None
    made, _ = rule(32, 64, bias_E)
    found = {name: float(x) for name, x in stability.stability(made, stability.Sample(tokens, None)).items()}
    assert ("flips/bf16_bias" in found) == biased
    assert "flips/actual" not in found
    for name, share in found.items():
        if name.startswith("flips/"):
            assert share <= found[name.replace("flips", "at_risk")]
    if seed == 0:  # among few tokens there may be none that flips
        assert found["flips/bf16_scores"] > 0
    assert found["margin/p01"] <= found["margin/p10"] <= found["margin/p50"]


def test_groups_that_a_token_may_not_use_are_left_out() -> None:
    made, weight = rule(16, 64, moe_router_num_groups=4, moe_router_group_topk=2)
    tokens = torch.randn(100, 64, generator=torch.Generator().manual_seed(2))
    chosen = made.chosen(made.biased(made.scores(made.logits(tokens)))).numpy()
    scores = 1 / (1 + np.exp(-(tokens.double() @ weight.double().t()).numpy()))
    for row, token in zip(chosen, scores, strict=True):
        groups = token.reshape(4, 4)
        best = np.argsort(-np.sort(groups, axis=1)[:, -2:].sum(axis=1))[:2]
        allowed = np.repeat(np.isin(np.arange(4), best), 4)
        expected = np.argsort(-np.where(allowed, token, -np.inf))[:4]
        assert set(np.flatnonzero(row)) == set(expected)


def test_tf32_keeps_ten_bits_of_mantissa_and_rounds_to_nearest_even() -> None:
    one = 1.0
    ulp = 2.0**-10
    given_ = torch.tensor([one + ulp, one + ulp / 2, one + 3 * ulp / 2, one + 0.51 * ulp, -one - 0.49 * ulp, 0.0])
    expected = [one + ulp, one, one + 2 * ulp, one + ulp, -one, 0.0]
    assert stability.tf32(given_).tolist() == expected


def test_the_probe_batch_is_compared_with_the_look_before_and_not_with_the_first() -> None:
    made, _ = rule(32, 64)
    tokens = torch.randn(200, 64)
    probe = stability.new_probe(made, tokens)
    made.weight_EH = torch.randn(32, 64)
    first = {name: float(value) for name, value in stability.changed(made, probe).items()}
    assert 0 < first["probe/slots_changed"] <= first["probe/changed"] <= 1
    second = stability.changed(made, probe)
    assert float(second["probe/changed"]) == 0


# Settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "expected"), [("", 0), ("off", 0), ("1", 1), (" 100 ", 100)])
def test_the_interval_is_off_or_a_number_of_steps(value: str, expected: int) -> None:
    assert from_environment({"MEGATRON_FP32_ROUTER_MONITOR": value}).monitor == expected


@pytest.mark.parametrize("value", ["0", "-1", "on", "1.5", "1e3", "٣"])
def test_any_other_interval_is_refused_with_what_is_accepted(value: str) -> None:
    with pytest.raises(SettingsError, match="accepted are 'off' and a whole number of steps, at least 1"):
        from_environment({"MEGATRON_FP32_ROUTER_MONITOR": value})
