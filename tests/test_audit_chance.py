"""The audit claims a cast, or any damage, only where values that never saw it would not look the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from audited import BF16, FP16, answer, checkpoint, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fp32_router.audit import audit, bits, lattice

KINDS = {"fp32": np.float32, "bf16": BF16, "fp16": FP16}


def trained(
    steps: int, rate: float, experts: int, kind: Any = np.float32, start: Any = 0.0, lean: float = 0.3, seed: int = 0
) -> Any:
    """Biases after Megatron's updates: the step as `kind` holds it, added in fp32; in every seventh some are 0."""
    random = np.random.default_rng(seed)
    bias, leans = np.full(experts, start, np.float32), np.linspace(-lean, lean, experts)
    for step in range(steps):
        sign = np.sign(random.random(experts) - 0.5 + leans)
        if step % 7 == 3:
            sign[random.random(experts) < 0.1] = 0
        bias = bias + sign.astype(np.float32) * np.float32(kind(rate))
    return bias


def claims_no_cast(values: Any, rates: Sequence[float], kind: str = "expert_bias") -> None:
    found = audit(checkpoint(values, kind), rates=list(rates))
    verdict, text = answer(found, "laundered")
    assert verdict in ("good", "unknown"), text
    for finding in found.findings:
        assert "grid" not in finding.text


# No cast, no claim -----------------------------------------------------------------------------------------------


def test_few_steps_that_a_bf16_counter_rounded_fit_fp16_and_are_no_cast() -> None:
    bias = np.arange(-6, 7).astype(np.float32) * np.float32(BF16(1e-3))
    assert bits.fitting(bias, "float16").all_fit
    for known in ([1e-3], []):
        claims_no_cast(bias, known)
        text = answer(audit(checkpoint(bias), rates=known), "laundered")[1]
        assert text == "cannot tell: all values fit float16, as few steps of one size also do (chance: 2^0)"


@settings(max_examples=300, deadline=None)
@given(
    rate=st.one_of(
        st.sampled_from([1e-3, 1e-4, 5e-4, 1e-2, 2e-3, 5e-3, 2e-4, 2.0**-10, 2.0**-7, 3 * 2.0**-11]),
        st.floats(1e-6, 0.1),
    ),
    steps=st.one_of(st.integers(1, 40), st.integers(41, 600)),
    experts=st.sampled_from([4, 8, 60, 64, 256]),
    kind=st.sampled_from(sorted(KINDS)),
    start=st.sampled_from([0.0, 0.0, 0.75, 0.3, -3.0]),
    lean=st.sampled_from([0.0, 0.3, 0.5]),
    known=st.booleans(),
    seed=st.integers(0, 9999),
)
def test_values_that_never_went_through_a_cast_are_never_called_laundered_nor_exact_ones_damaged(
    rate: float, steps: int, experts: int, kind: str, start: float, lean: float, known: bool, seed: int
) -> None:
    bias, rates = trained(steps, rate, experts, KINDS[kind], start, lean, seed), [rate] if known else []
    claims_no_cast(bias, rates)
    if kind == "fp32":
        assert answer(audit(checkpoint(bias), rates=rates), "updates")[0] in ("good", "unknown")


@pytest.mark.parametrize(("first", "then"), [(1e-2, 1e-3), (1e-3, 1e-4), (1e-4, 1e-3), (2.0**-10, 1e-3)])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_rate_that_changed_after_few_steps_is_no_cast(first: float, then: float, kind: str) -> None:
    for steps in (1, 2, 3, 6):
        bias = trained(steps, first, 64, KINDS[kind]) + trained(8, then, 64, KINDS[kind], seed=1)
        for known in ([then], [first, then], []):
            claims_no_cast(bias, known)


def test_numbers_that_somebody_chose_are_no_cast() -> None:
    for values in (np.arange(64) / 64, np.linspace(-1, 1, 129), np.eye(8) * np.arange(8)):
        for kind in ("weight", "bias", "qb_beta", "expert_bias"):
            for known in ([], [1e-3])[: 1 if kind == "expert_bias" else 2]:
                claims_no_cast(values.astype(np.float32), known, kind)
        found = audit(checkpoint(values.astype(BF16), "weight", values.astype(np.float32)))
        assert answer(found, "main copy")[0] == "good"


@pytest.mark.parametrize("rate", [1e-3, 5e-4, 2.0**-10, 3 * 2.0**-11])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_chance_is_what_counting_the_points_of_the_grid_gives(rate: float, dtype: str) -> None:
    step = 2 * lattice.rounded(rate, "bfloat16")
    last = next(bit for bit in range(-60, 0) if step % 2.0 ** (bit + 1))
    for exponent in range(-6, 2):
        grid = np.arange(int(2.0**exponent / step) + 1, int(2.0 ** (exponent + 1) / step)) * step
        fits = bits.rounded(grid, dtype).astype(float) == grid
        if fits.sum() < 4:
            continue
        chosen = grid[fits][:4]
        log2 = bits.fitting(chosen, dtype, [rate]).log2_chance / 4
        # Rounded down to a power of two below: the points that fit are so many grid points apart.
        assert 2.0**log2 == 1 / np.diff(np.flatnonzero(fits)).min(), (exponent, last)


# A cast is found -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", [BF16, FP16])
@pytest.mark.parametrize("rate", [1e-3, 5e-4, 1e-2, 2e-3, 1e-4])
@pytest.mark.parametrize("known", [True, False])
def test_a_cast_after_thousands_of_steps_is_found(cast: Any, rate: float, known: bool) -> None:
    bias = trained(4000, rate, 64)
    claims_no_cast(bias, [rate] if known else [])
    bias = bias.astype(cast).astype(np.float32)
    guessed, sure = (bits.fitting(bias, np.dtype(cast).name, rates).log2_chance for rates in ([], [rate]))
    assert sure <= guessed, "a known rate rules histories out"
    found = audit(checkpoint(bias), rates=[rate] if known else [])
    verdict, text = answer(found, "laundered")
    assert verdict == "problem"
    assert f"fit {np.dtype(cast).name} (chance: 2^-" in text
    assert answer(found, "updates")[0] == ("problem" if known or cast is BF16 else "unknown")


def test_no_chance_is_smaller_than_that_of_random_numbers() -> None:
    bias = normal(8).astype(BF16).astype(np.float32)
    for dtype, cleared in (("bfloat16", 16), ("float16", 13)):
        assert bits.fitting(bias, dtype, [1e-9]).log2_chance == -8 * cleared


def test_values_on_a_finer_grid_than_a_rates_are_measured_on_their_own() -> None:
    bias = normal(64).astype(FP16).astype(np.float32)
    assert bits.fitting(bias, "float16", [1e-2]).log2_chance == bits.fitting(bias, "float16").log2_chance


def test_a_cast_of_few_experts_is_found_where_the_rate_is_known_even_if_bf16_holds_it() -> None:
    for rate, experts, start in ((1e-3, 8, 0.0), (1e-3, 8, 6.9), (2.0**-10, 64, 0.75)):
        bias = trained(4000, rate, experts, start=start).astype(BF16).astype(np.float32)
        assert answer(audit(checkpoint(bias), rates=[rate]), "laundered")[0] == "problem"


def test_a_weight_that_went_through_fp8_is_not_said_to_have_gone_through_bf16() -> None:
    weight = normal(8, 64).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    verdict, text = answer(audit(checkpoint(weight, "weight")), "laundered")
    assert (verdict, text.endswith("so they were rounded to it, or to something coarser")) == ("problem", True)


# Other sentences that were not so --------------------------------------------------------------------------------


def test_a_cast_that_would_lose_nothing_is_no_finding() -> None:
    for values in (np.arange(-3, 3).astype(np.float32) * np.float32(BF16(1e-3)) * 2, np.full(6, 0.75, BF16)):
        assert {f.check for f in audit(checkpoint(values, rate=1e-3)).findings}.isdisjoint({"room"})
    found = audit(checkpoint(trained(300, 1e-3, 64, start=0.75), rate=1e-3))
    text = answer(found, "room")[1]
    assert "after a cast to bfloat16" in text
    assert "float16" not in text.replace("bfloat16", "")


def test_experts_that_nobody_ever_chose_meet_at_one_end_and_are_no_damage() -> None:
    bias = trained(300, 1e-3, 32)
    bias[16:] = trained(300, 1e-3, 1, lean=-2.0)
    assert float(bias[16]) == pytest.approx(0.3, rel=0.2)
    verdict, text = answer(audit(checkpoint(bias, rate=1e-3)), "updates")
    assert (verdict, text.endswith("or they went the same way in every step")) == ("unknown", True)


def test_three_large_values_that_lie_near_a_lattice_by_chance_are_no_verdict() -> None:
    for rounding in ("float32", "bfloat16"):
        step = lattice.rounded(1e-4, rounding)
        bias = (np.float32(60.0) + np.array([0, 1, 2, 2], np.float32) * np.float32(step)).astype(np.float32)
        verdict, text = answer(audit(checkpoint(bias, rate=1e-4)), "updates")
        assert (verdict, "by chance" in text) == ("unknown", True)


def test_values_near_a_lattice_of_another_rate_are_not_said_to_be_off_it() -> None:
    bias = trained(300, 2e-3, 32) + normal(32) * np.float32(1e-5)
    verdict, text = answer(audit(checkpoint(bias, rate=5e-3)), "updates")
    assert (verdict, text.startswith("near whole steps of 0.002, not of 0.005, but off by")) == ("problem", True)


def test_a_rate_that_fp16_cannot_hold_is_judged_in_the_others() -> None:
    for rate in (1e-9, 1e6):
        assert answer(audit(checkpoint(trained(30, rate, 8), rate=rate)), "updates")[0] == "good"


def test_between_a_quarter_and_below_a_bf16_bias_goes_down_by_less_than_up() -> None:
    text = answer(audit(checkpoint(np.array([0.25, 0.3], BF16), rate=1e-3)), "updates")[1]
    assert "moves these biases by 0.000977 to 0.00195" in text


def test_a_wider_copy_of_the_same_values_was_not_rounded() -> None:
    low = (np.arange(8) / 8).astype(BF16)
    for kind in ("weight", "expert_bias"):
        for iterations in ((10, 10), (None, None), (10, None)):
            one = checkpoint(low.astype(np.float32), kind, iteration=iterations[0])
            found = audit(one, checkpoint(low, kind, iteration=iterations[1]))
            assert answer(found, "against")[0] == "note"
            assert answer(found, "against")[1].startswith("the same 8 values")
    one = checkpoint(low.astype(np.float32), "weight", iteration=20)
    said = answer(audit(one, checkpoint(low, "weight", iteration=10)), "against")
    assert said == ("note", "none of 8 values moved in 10 iterations: frozen?")


def test_more_steps_than_iterations_is_said_of_a_rate_that_is_known_only() -> None:
    # Few steps of 2e-3 are twice as many of 1e-3, bit for bit.
    early = trained(3, 2e-3, 16, seed=1)
    late = trained(4, 2e-3, 16, lean=0.5, start=early)
    for known, verdict in (([], "good"), ([1e-3, 2e-3], "good"), ([1e-3], "problem")):
        found = audit(checkpoint(late, iteration=7), checkpoint(early, iteration=3), rates=known)
        assert answer(found, "against")[0] == verdict, answer(found, "against")
