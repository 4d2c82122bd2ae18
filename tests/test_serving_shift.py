"""The shift of expert biases before a cast to bf16: no choice changes, and bf16 flips many fewer.

SHIFT_TOKENS=1000000 draws more tokens (some ten minutes).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file

from megatron_fp32_router.cli import main
from megatron_fp32_router.serving.shift import shift_expert_bias

TOKENS = int(os.environ.get("SHIFT_TOKENS", "4000"))
NAME = "decoder.layers.0.mlp.router.expert_bias"
Array = np.ndarray


def walked(start: float, experts: int, seed: int = 0, spread: float = 0.05) -> Array:
    """Biases as a long training leaves them: fp32 steps of 1e-3, around `start`."""
    random = np.random.default_rng(seed)
    bias = (start + random.normal(0, spread, experts)).astype(np.float32)
    for signs in random.choice([-1, 1], (300, experts)):
        bias += signs.astype(np.float32) * np.float32(1e-3)
    return bias


def shifted(bias: Array, how: str = "min") -> Array:
    state, shifts = shift_expert_bias({NAME: bias}, how)  # type: ignore[arg-type]
    assert shifts[NAME].why == ""
    return state[NAME]


def chosen(scores: Array, topk: int, groups: int = 1, kept: int = 1, masked: float = -np.inf) -> Array:
    """[tokens, experts] of bool, by the rule of DeepSeek-V3: ties go to the expert with the lower number."""
    if groups > 1:
        of_groups = scores.reshape(len(scores), groups, -1)
        of_groups = np.partition(of_groups, -2, axis=2)[:, :, -2:].sum(axis=2, dtype=scores.dtype)
        keep = np.zeros((len(scores), groups), bool)
        np.put_along_axis(keep, np.argsort(-of_groups, axis=1, kind="stable")[:, :kept], True, axis=1)
        scores = np.where(np.repeat(keep, scores.shape[1] // groups, axis=1), scores, scores.dtype.type(masked))
    found = np.zeros(scores.shape, bool)
    np.put_along_axis(found, np.argsort(-scores, axis=1, kind="stable")[:, :topk], True, axis=1)
    return found


def scores_of_tokens(experts: int, tokens: int = TOKENS, seed: int = 1):  # type: ignore[no-untyped-def]
    """Sigmoid scores in fp32, some thousand tokens at a time."""
    random = np.random.default_rng(seed)
    for start in range(0, tokens, 20_000):
        logits = random.normal(-1, 1, (min(20_000, tokens - start), experts))
        yield (1 / (1 + np.exp(-logits))).astype(np.float32)


def differ(one: Array, other: Array) -> int:
    return int((one != other).any(axis=1).sum())


@pytest.mark.parametrize("grouped", [False, True], ids=["ungrouped", "grouped"])
@pytest.mark.parametrize(("experts", "topk"), [(8, 2), (64, 6), (256, 8), (384, 8)])
def test_no_choice_changes_and_bf16_flips_a_fifth_at_most(experts: int, topk: int, grouped: bool) -> None:
    groups, kept = ((4, 2) if experts == 8 else (8, 4)) if grouped else (1, 1)
    bias = walked(30, experts)
    moved = shifted(bias)
    changed = in_fp32 = before = after = 0
    for scores in scores_of_tokens(experts):
        # fp64 holds the sum of two such fp32 numbers exactly: this is the choice that the numbers themselves make.
        exact = chosen(scores.astype(np.float64) + bias.astype(np.float64), topk, groups, kept)
        changed += differ(exact, chosen(scores.astype(np.float64) + moved.astype(np.float64), topk, groups, kept))
        # An engine adds in fp32, which near 30 rounds to 2e-6: what it chooses after the shift is the exact choice
        # more often than what it chooses before.
        in_fp32 += differ(exact, chosen(scores + moved, topk, groups, kept))
        before += differ(exact, chosen(scores + bias.astype(bfloat16).astype(np.float32), topk, groups, kept))
        after += differ(exact, chosen(scores + moved.astype(bfloat16).astype(np.float32), topk, groups, kept))
    print(
        f"{experts} experts, {groups} groups, {TOKENS} tokens: {changed} exact, {in_fp32} fp32, bf16 {before} → {after}"
    )
    assert changed == 0
    # Two sums that fp32 cannot tell apart: some per million tokens.
    assert in_fp32 <= TOKENS // 100_000
    assert before > TOKENS // 20
    assert before >= 5 * after


def test_an_engine_that_multiplies_masked_groups_by_zero_needs_no_bias_below_zero() -> None:
    bias = walked(-3, 64)
    moved = shifted(bias)
    assert bias.max() < -1
    assert moved.min() >= 0
    (scores,) = scores_of_tokens(64, 2000)
    right = chosen(scores + bias, 6, 8, 4)
    assert differ(right, chosen(scores + bias, 6, 8, 4, masked=0.0)) == 2000
    assert differ(right, chosen(scores + moved, 6, 8, 4, masked=0.0)) == 0


@pytest.mark.parametrize("how", ["min", "mean"])
@pytest.mark.parametrize("start", [30.0, 6.9, -30.0])
def test_every_difference_is_exact(start: float, how: str) -> None:
    bias = walked(start, 64)
    state, shifts = shift_expert_bias({NAME: bias, "decoder.layers.0.mlp.router.weight": bias}, how)  # type: ignore[arg-type]
    assert state[NAME].dtype == np.float32
    assert (state[NAME].astype(np.float64) == bias.astype(np.float64) - shifts[NAME].constant).all()
    assert state["decoder.layers.0.mlp.router.weight"] is bias
    assert (state[NAME].min() >= 0) == (how == "min")


def test_biases_of_one_sign_are_always_shifted_exactly() -> None:
    random = np.random.default_rng(2)
    for largest in (0.5, 3, 40, 1000):
        for _ in range(50):
            bias = random.uniform(largest / 1000, largest, 16).astype(np.float32)
            state, shifts = shift_expert_bias({NAME: bias})
            assert "does not hold" not in shifts[NAME].why
            assert (state[NAME].astype(np.float64) == bias.astype(np.float64) - shifts[NAME].constant).all()
            assert state[NAME].min() >= 0


@pytest.mark.parametrize(
    ("bias", "why"),
    [
        (np.array([-0.7, 1e-9, 0.3], np.float32), "fp32 does not hold every difference"),
        (np.array([0.0, 0.5, 1.0], np.float32), "bfloat16 holds these biases as well"),
        (np.zeros(4, np.float32), "bfloat16 holds these biases as well"),
        (np.array([30.0, np.nan], np.float32), "expected finite float32"),
        (np.array([30.0, 31.0], bfloat16), "expected finite float32 [experts], found bfloat16"),
    ],
)
def test_a_layer_that_gains_nothing_is_left_alone_with_the_reason(bias: Array, why: str) -> None:
    state, shifts = shift_expert_bias({NAME: bias})
    assert state[NAME] is bias
    assert why in shifts[NAME].why
    assert shifts[NAME].constant == 0.0


def test_audit_writes_shifted_biases_beside_what_it_restores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (3, 4)]
    save_file({names[0]: walked(30, 16), names[1]: np.zeros(16, np.float32)}, tmp_path / "model.safetensors")
    main(["audit", str(tmp_path / "model.safetensors"), "--repair", str(tmp_path / "out"), "--shift-bias"])
    said = json.loads((tmp_path / "out" / "repair.json").read_text(encoding="utf-8"))
    written = load_file(tmp_path / "out" / "router.safetensors")
    assert list(written) == [names[0]]
    assert (written[names[0]] + np.float64(said["shifted"][names[0]]) == walked(30, 16).astype(np.float64)).all()
    assert "holds these biases as well" in said["not_shifted"][names[1]]
    assert said["routers"] == {names[0]: {"stack": "decoder", "layer": 3, "kind": "expert_bias"}}
    out = capsys.readouterr().out
    assert "repair: 1 expert_bias tensors shifted" in out
    assert f"not shifted: {names[1]}" in out


def test_a_shift_without_a_place_for_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(tmp_path), "--shift-bias"]) == 2
    assert "--shift-bias goes with --repair OUT" in capsys.readouterr().err
