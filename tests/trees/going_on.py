"""What the tests of going on in a new process share: whether a run ended as one that never stopped."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
from pretrain import STEPS, Run, protected, trained
from saved import differences, values

HALF = STEPS // 2
#: A CPU has one generator, which passes for CUDA's as well; nothing draws from it here after the start.
GENERATOR = re.compile(r"\.(torch|cuda)_rng_state$")


def assert_went_on(resumed: Run, straight: Run, *, but: tuple[str, ...] = ()) -> None:
    """The two ended alike: every loss of every token, every tensor and number that they saved last, and every bias.

    Args:
        but: names of numbers that Megatron does not restore, plugin off or on.
    """
    trained(resumed)
    protected(resumed)
    assert resumed.scores() == straight.scores()
    for rank, whole in zip(resumed.ranks, straight.ranks, strict=True):
        assert rank["losses"] == whole["losses"][-len(rank["losses"]) :]
        assert rank["looks"] == whole["looks"][-len(rank["looks"]) :]
        assert len(rank["losses"]) * 2 == len(whole["losses"]) > 0
    ended, expected = values(resumed.saved(STEPS)), values(straight.saved(STEPS))
    for what in (r"router\.weight$", r"router\.expert_bias$", r"exp_avg"):
        assert any(re.search(what, name) for name in expected), f"nothing named {what} is in the checkpoint"
    assert [name for name in differences(ended, expected) if not GENERATOR.search(name) and name not in but] == []
    # And it is a comparison that sees something.
    assert differences(expected, values(straight.saved(HALF)))


def rounded(weights: list[Any]) -> list[Any]:
    return [np.array(weight).astype(ml_dtypes.bfloat16).astype(float).tolist() for weight in weights]
