"""What the audit concludes, on values whose history is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audited import BF16, EXPERTS, FP16, answer, checkpoint, normal, walk
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_fp32_router.audit import Checkpoint, RouterTensor, audit, bits, lattice

# The lattice -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(5, 400),
    rate=st.sampled_from([1e-3, 1e-4, 5e-4, 1e-2]),
    start=st.sampled_from([0.0, 0.0, 0.3, 0.75, -3.0, 6.9]),
    drift=st.sampled_from([0.0, 0.4, -0.9]),
    seed=st.integers(0, 999),
)
# One crosses 2^-5, where it is rounded, and comes back.
@example(steps=43, rate=1e-3, start=0.0, drift=0.0, seed=315)
def test_biases_of_an_exact_run_are_whole_steps_apart(
    steps: int, rate: float, start: float, drift: float, seed: int
) -> None:
    bias = walk(steps, rate, start, drift, seed)
    fit = lattice.best(bias, [rate])
    assert fit.exact
    assert fit.rounding == "float32"
    later = lattice.fit(walk(steps + 50, rate, start, drift, seed), rate, "float32", since=bias)
    assert later.exact


@settings(max_examples=30, deadline=None)
@given(steps=st.integers(20, 400), start=st.sampled_from([0.0, 0.75, -1.5]), seed=st.integers(0, 999))
def test_steps_that_a_bf16_counter_rounded_are_told_from_exact_ones(steps: int, start: float, seed: int) -> None:
    step = float(BF16(1e-3))
    assert step == 0.00099945068359375
    found = audit(checkpoint(walk(steps, step, start, seed=seed), rate=1e-3))
    verdict, text = answer(found, "updates")
    assert (verdict, "token counter was bfloat16" in text) == ("problem", True)


def test_two_hundred_thousand_steps_drift_by_a_fifth_of_a_percent_and_are_clean() -> None:
    counts = np.arange(EXPERTS) * 6451 + 7
    bias, value, reached = np.zeros(EXPERTS, np.float32), np.float32(0), 0
    for expert, count in enumerate(counts):
        for _ in range(int(count) - reached):
            value = value + np.float32(1e-3)
        bias[expert], reached = value, int(count)
    assert abs(float(bias[-1]) / (float(counts[-1]) * 1e-3) - 1.002) < 0.0005
    assert np.array_equal(np.round(lattice.steps(bias, lattice.rounded(1e-3, "float32"))), counts)
    assert answer(audit(checkpoint(bias, rate=1e-3)), "updates")[0] == "good"


def test_a_common_shift_such_as_a_subtracted_mean_is_no_damage() -> None:
    bias = walk(300, 1e-3)
    assert answer(audit(checkpoint((bias - bias.mean()).astype(np.float32), rate=1e-3)), "updates")[0] == "good"
    assert lattice.best((bias - bias.mean()).astype(np.float32), [1e-3]).share == 1.0


def test_biases_off_the_lattice_are_a_problem_when_the_rate_is_known_and_unknown_when_not() -> None:
    bias = normal(EXPERTS) / 10
    assert answer(audit(checkpoint(bias, rate=1e-3)), "updates")[0] == "problem"
    assert answer(audit(checkpoint(bias)), "updates")[0] == "unknown"
    assert answer(audit(checkpoint(bias), rates=[1e-3]), "updates")[0] == "problem"


def test_at_a_size_where_rounding_hides_the_difference_the_audit_says_so() -> None:
    verdict, text = answer(audit(checkpoint(walk(300, 1e-3, 34.0), rate=1e-3)), "updates")
    assert verdict == "good"
    assert "steps rounded to bfloat16 would look the same" in text


@pytest.mark.parametrize("rate", [1e-4, 5e-4, 2e-4])
def test_a_finer_rate_than_the_known_one_is_not_good_but_may_be_a_change_of_rate(rate: float) -> None:
    verdict, text = answer(audit(checkpoint(walk(300, rate), rate=1e-3)), "updates")
    assert verdict == "unknown"
    assert f"whole steps of {rate:g} apart, not of 0.001, which was to be expected" in text
    assert "was the rate changed in between? Then give --rate for each" in text
    assert answer(audit(checkpoint(walk(300, rate), rate=1e-3), rates=[1e-3, rate]), "updates")[0] == "good"
    assert answer(audit(checkpoint(walk(300, rate))), "updates")[0] == "good"


def test_a_rate_that_the_known_one_is_no_multiple_of_is_a_problem() -> None:
    verdict, text = answer(audit(checkpoint(walk(300, 2e-3), rate=5e-3)), "updates")
    assert (verdict, "whole steps of 0.002 apart, not of 0.005, which was to be expected" in text) == ("problem", True)
    assert answer(audit(checkpoint(walk(300, 1e-2), rate=1e-3)), "updates")[0] == "problem"
    assert answer(audit(checkpoint(walk(300, 1e-2), rate=1e-9)), "updates")[0] == "problem"
    # None of those that are usual.
    assert answer(audit(checkpoint(walk(300, 7.7e-4), rate=1e-3)), "updates")[0] == "problem"


def test_between_two_checkpoints_the_known_rate_is_the_one_to_be_found() -> None:
    early = walk(100, 1e-3)
    for rate, verdict in ((1e-3, "good"), (1e-4, "unknown"), (7.7e-4, "problem")):
        late = early
        for step in range(60):
            late = late + np.sign(np.sin(np.arange(EXPERTS) * 7.0 + step)).astype(np.float32) * np.float32(rate)
        found = audit(checkpoint(late, iteration=160, rate=1e-3), checkpoint(early, iteration=100))
        assert answer(found, "against")[0] == verdict


def test_one_bias_of_many_that_is_off_the_lattice_is_no_change_of_rate() -> None:
    bias = walk(300, 1e-3, start=0.75)
    bias[7] += np.float32(0.4e-3)
    verdict, text = answer(audit(checkpoint(bias, rate=1e-3)), "updates")
    assert (verdict, "1 of 32 biases are not whole steps of 0.001 apart" in text) == ("problem", True)


# Swallowed updates -----------------------------------------------------------------------------------------------


def test_a_bf16_bias_at_three_quarters_swallows_every_update() -> None:
    found = audit(checkpoint(np.full(8, 0.75, BF16), rate=1e-3))
    verdict, text = answer(found, "updates")
    assert verdict == "problem"
    assert "8 of 8 biases cannot take an update of 0.001 in bfloat16" in text
    assert "upwards for 8, downwards for 8; all 8 hold 0.75" in text


def test_at_one_half_a_bf16_bias_can_go_down_but_never_up() -> None:
    up, down = lattice.swallowed(np.array([0.5, 0.25, 0.0], BF16), 1e-3)
    assert up.tolist() == [True, False, False]
    assert down.tolist() == [False, False, False]


def test_between_a_quarter_and_a_half_a_bf16_bias_moves_by_twice_the_rate() -> None:
    verdict, text = answer(audit(checkpoint(np.array([0.3, 0.31, 0.4, 0.45], BF16), rate=1e-3)), "updates")
    assert (verdict, "moves these biases by 0.00195 to 0.00195" in text) == ("problem", True)


@pytest.mark.parametrize(("start", "steps"), [(0.0, 300), (0.5, 3000)])
def test_experts_that_hold_one_value_while_the_others_walk_far_are_a_problem(start: float, steps: int) -> None:
    bias = walk(steps, 1e-3, start)
    bias[:16] = start
    verdict, text = answer(audit(checkpoint(bias, rate=1e-3)), "updates")
    assert (verdict, "16 of 32 biases hold exactly" in text) == ("problem", True)
    verdict, text = answer(audit(checkpoint(bias)), "updates")
    assert (verdict, "16 of 32 biases hold exactly" in text) == ("unknown", True)


@pytest.mark.parametrize("experts", [8, 64, 256])
def test_experts_that_share_a_value_as_walks_do_are_no_problem(experts: int) -> None:
    random = np.random.default_rng(experts)
    # Where balance is; a part of them at the same place, a few far off.
    places = [np.zeros(experts), random.standard_normal(experts) * 0.02]
    places.append(np.where(random.random(experts) < 0.3, random.standard_normal(experts) * 0.2, 0.0))
    for target in places:
        bias = np.zeros(experts, np.float32)
        for step in range(400):
            noise = random.standard_normal(experts) * 0.002
            bias = bias + np.sign(target - bias + noise).astype(np.float32) * np.float32(1e-3)
            if step in (2, 5, 10, 20, 50, 51, 100, 200, 399):
                verdict, text = answer(audit(checkpoint(bias, rate=1e-3)), "updates")
                assert verdict == "good" or "cannot tell" in text.split(": ")[0], text
                assert "hold exactly" not in text


def test_a_bias_in_whole_numbers_is_a_problem_and_one_in_fp64_is_judged_like_fp32() -> None:
    verdict, text = answer(audit(checkpoint(np.arange(8), rate=1e-3)), "dtype")
    assert (verdict, "int64 on disk: whole numbers" in text) == ("problem", True)
    assert answer(audit(checkpoint(np.arange(8), "local_tokens_per_expert")), "dtype")[0] == "good"
    for bias, verdict in ((walk(300, 1e-3), "good"), (walk(300, 7.7e-4), "problem")):
        found = audit(checkpoint(bias.astype(np.float64), rate=1e-3))
        assert answer(found, "updates")[0] == verdict
        assert answer(found, "dtype") == ("good", "float64 on disk: more than fp32, which no release of Megatron makes")
    assert answer(audit(checkpoint(np.linspace(0, 1, 8), rate=1e-3)), "updates")[0] == "unknown"


def test_equal_biases_and_zeros_are_no_verdict() -> None:
    assert answer(audit(checkpoint(np.full(8, 0.75, np.float32))), "updates")[0] == "unknown"
    found = audit(checkpoint(np.zeros(8, np.float32)))
    assert answer(found, "updates")[0] == answer(found, "laundered")[0] == "unknown"
    assert found.exit_code == 2


def test_biases_that_drifted_far_lose_their_experts_in_bf16() -> None:
    # GLM-5.2, sgl-project/sglang#31213: 238 different values between 6.817 and 7.063, 8 after the cast.
    bias = np.linspace(6.817, 7.063, 238).astype(np.float32)
    (finding,) = (f for f in audit(checkpoint(bias)).findings if f.check == "room")
    assert finding.data["distinct"] == 238
    assert finding.data["distinct_after"]["bfloat16"] in (8, 9)


# Laundered -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", [BF16, FP16])
def test_an_fp32_weight_that_went_through_a_cast_is_found_with_its_chance(cast: Any) -> None:
    found = audit(checkpoint(normal(8, 64).astype(cast).astype(np.float32), "weight"))
    verdict, text = answer(found, "laundered")
    assert verdict == "problem"
    assert f"all 512 nonzero values fit {np.dtype(cast).name} (chance: 2^-" in text
    assert answer(audit(checkpoint(normal(8, 64), "weight")), "laundered")[0] == "good"


def test_few_values_or_a_rate_that_fits_itself_are_no_evidence() -> None:
    few = np.zeros(64, np.float32)
    few[:3] = [0.5, 0.75, 1.0]
    assert answer(audit(checkpoint(few, "weight")), "laundered")[0] == "unknown"
    power_of_two = walk(40, 2.0**-10)
    assert bits.fitting(power_of_two, "bfloat16").all_fit
    assert answer(audit(checkpoint(power_of_two, rate=2.0**-10)), "laundered")[0] == "unknown"


def test_the_same_tensor_in_the_initial_checkpoint_is_no_evidence() -> None:
    weight = normal(8, 64).astype(BF16).astype(np.float32)
    first = checkpoint(weight, "weight", iteration=0)
    assert answer(audit(checkpoint(weight, "weight", iteration=9), first), "laundered")[0] == "unknown"
    moved = (weight + normal(8, 64, seed=1)).astype(BF16).astype(np.float32)
    assert answer(audit(checkpoint(moved, "weight", iteration=9), first), "laundered")[0] == "problem"


def test_rows_that_have_not_moved_since_a_cast_are_noted_but_no_problem() -> None:
    weight = normal(8, 64)
    weight[2] = weight[2].astype(BF16)
    verdict, text = answer(audit(checkpoint(weight, "weight")), "laundered")
    assert (verdict, "64 of 512 values fit bfloat16" in text) == ("note", True)


def test_values_that_are_not_finite_are_a_problem_and_stop_other_questions() -> None:
    for bad in (np.nan, np.inf):
        found = audit(checkpoint(np.array([0.1, bad, 0.2, 0.3], np.float32)))
        assert answer(found, "finite")[0] == "problem"
        assert {f.check for f in found.findings} == {"dtype", "finite"}


def test_an_fp32_bias_from_a_bf16_run_is_found_on_bf16s_grid_and_stuck_at_its_threshold() -> None:
    bias = np.zeros(EXPERTS, BF16)
    for step in range(900):
        votes = np.where(np.arange(EXPERTS) < 12, 1, (-1) ** (step + np.arange(EXPERTS))).astype(BF16)
        bias = bias + votes * BF16(1e-3)
    assert bias[:12].tolist() == [0.5] * 12
    bias[12:] += np.linspace(0.01, 0.3, EXPERTS - 12).astype(BF16)
    found = audit(checkpoint(bias.astype(np.float32), rate=1e-3))
    assert answer(found, "laundered")[0] == "problem"
    verdict, text = answer(found, "updates")
    assert (verdict, "held in bfloat16, 12 of 32 cannot take another step" in text) == ("problem", True)


def test_a_rate_that_changed_during_the_run_is_no_damage_when_both_are_given() -> None:
    bias = walk(300, 1e-3) + np.float32(0)
    for step in range(150):
        bias = bias + np.sign(np.sin(np.arange(EXPERTS) * 7.0 + step)).astype(np.float32) * np.float32(1e-4)
    assert answer(audit(checkpoint(bias), rates=[1e-3, 1e-4]), "updates")[0] == "good"
    # 1e-4 is among the usual rates and fits; that it was used is a guess.
    assert answer(audit(checkpoint(bias), rates=[1e-3]), "updates")[0] == "unknown"


# Main copies -----------------------------------------------------------------------------------------------------


def test_which_of_two_copies_is_the_truth() -> None:
    main = normal(8, 64)
    for values, copy, verdict, says in (
        (main.astype(BF16), main, "note", "the main copy is the truth, the model holds it rounded"),
        (main, main, "good", "the same, bit for bit"),
        (main.astype(BF16).astype(np.float32), main, "problem", "weight is the main copy rounded to bfloat16"),
        (main.astype(BF16), main.astype(BF16).astype(np.float32), "problem", "the main copy itself fits bfloat16"),
        (main, normal(8, 64, seed=1), "problem", "one is stale"),
    ):
        found = audit(checkpoint(values, "weight", copy))
        assert answer(found, "main copy")[0] == verdict
        assert says in answer(found, "main copy")[1]


# Two checkpoints -------------------------------------------------------------------------------------------------


def test_an_export_that_rounds_is_found_across_formats() -> None:
    trainer, export = checkpoint(normal(8, 64), "weight"), checkpoint(normal(8, 64).astype(BF16), "weight")
    export.tensors = [
        RouterTensor("model.layers.0.mlp.gate.weight", "weight", "bfloat16", (8, 64), export.tensors[0].values)
    ]
    verdict, text = answer(audit(trainer, export), "against")
    assert (verdict, "rounded from float32 to bfloat16" in text) == ("problem", True)


def test_more_steps_than_iterations_cannot_be() -> None:
    late, early = walk(60, 1e-3, drift=0.3), walk(10, 1e-3, drift=0.3)
    honest = audit(checkpoint(late, iteration=60, rate=1e-3), checkpoint(early, iteration=10))
    assert answer(honest, "against")[0] == "good"
    wrong = audit(checkpoint(late, iteration=20, rate=1e-3), checkpoint(early, iteration=10))
    assert answer(wrong, "against")[0] == "problem"


@pytest.mark.parametrize("kind", ["weight", "expert_bias"])
def test_two_checkpoints_of_one_iteration_that_differ_are_not_good(kind: str) -> None:
    one, two = (normal(8, 64, seed=s) if kind == "weight" else walk(300, 1e-3, seed=s) for s in (1, 2))
    found = audit(checkpoint(one, kind, iteration=10, rate=1e-3), checkpoint(two, kind, iteration=10))
    verdict, text = answer(found, "against")
    assert (verdict, "of another run or model, or changed since" in text) == ("unknown", True)
    assert (found.verdict, found.exit_code) == ("unknown", 2)
    assert kind == "expert_bias" or abs(found.findings[-1].data["correlation"]) < 0.3
    same = audit(checkpoint(one, kind, iteration=10, rate=1e-3), checkpoint(one.copy(), kind, iteration=10))
    assert (answer(same, "against")[0], same.verdict) == ("note", "good")
    # Another dtype, and not the same values in it either.
    wide = audit(checkpoint(one, kind, iteration=10, rate=1e-3), checkpoint(two.astype(np.float64), kind, iteration=10))
    assert answer(wide, "against")[0] == "unknown"


def test_weights_that_have_nothing_in_common_are_noted() -> None:
    one, two = normal(8, 64, seed=1), normal(8, 64, seed=2)
    for other, said in ((two, True), (one + two / 100, False)):
        found = audit(checkpoint(one, "weight", iteration=20), checkpoint(other, "weight", iteration=10))
        assert ("or of another model" in answer(found, "against")[1]) == said
        assert answer(found, "against")[0] == "note"


def test_a_bias_that_stands_still_is_a_problem_only_where_its_dtype_explains_it() -> None:
    low, high = np.full(8, 0.75, BF16), walk(30, 1e-3)
    swallowed = audit(checkpoint(low, iteration=20, rate=1e-3), checkpoint(low, iteration=10))
    assert answer(swallowed, "against")[0] == "problem"
    frozen = audit(checkpoint(high, iteration=20, rate=1e-3), checkpoint(high, iteration=10))
    assert answer(frozen, "against")[0] == "unknown"


def test_a_tensor_that_only_one_checkpoint_has_is_named() -> None:
    found = audit(checkpoint(walk(30, 1e-3)), Checkpoint(Path("there"), "made up"))
    assert answer(found, "against") == ("unknown", "there has no such tensor")


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(width=32), min_size=0, max_size=9),
    other=st.lists(st.floats(width=32), min_size=0, max_size=9),
    dtype=st.sampled_from([np.float32, np.float64, BF16, FP16, np.int32, np.uint8, np.bool_]),
    kind=st.sampled_from(["weight", "expert_bias", "qb_beta", "local_tokens_per_expert"]),
)
def test_no_values_upset_the_audit(values: list[float], other: list[float], dtype: Any, kind: str) -> None:
    with np.errstate(all="ignore"):
        one, two = np.array(values, np.float32).astype(dtype), np.array(other, np.float32).astype(dtype)
    main = np.array(values, np.float32)[::-1]
    found = audit(checkpoint(one, kind, main, rate=1e-3, iteration=3), checkpoint(two, kind, iteration=1))
    json.dumps(found.to_json(), allow_nan=False)
    broken = one.size > 0 and not np.isfinite(one.astype(np.float64)).all()
    rounded = dtype in (BF16, FP16) or (dtype is np.int32 and kind in ("expert_bias", "qb_beta"))
    assert found.exit_code == 1 or not (broken or rounded)
    assert found.exit_code != 0 or one.size
