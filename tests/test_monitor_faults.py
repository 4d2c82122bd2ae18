"""Whatever fails in the monitor, on whichever rank: the training goes on as without it, in bounded time, and says why.

Two data-parallel ranks and two pipeline stages, with the counts of all ranks (`aux_loss`) and with expert biases. What
is broken is broken on one rank, under `raise` and under `warn`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bootstrap
import pytest

from megatron_fp32_router import lab

PROGRAMS = Path(__file__).parent / "programs"
TINY: dict[str, Any] = {"seq_length": 16, "hidden": 16, "heads": 2, "moe_ffn": 16, "experts": 4, "micro_batches": 1}
AUX = {"expert_bias": False, "load_balancing": "aux_loss", "score_function": "softmax"}
#: Seconds that a rank is waited for, and that a scene may take on a busy machine.
PATIENCE, LIMIT = 0.5, 20.0

ENDED = "the monitor has ended, and the training goes on without it: "
UNTOLD = r".*, and could not tell the other ranks \(RuntimeError: injected: Broken pipe\)"
UNHEARD = f"{ENDED}nothing was heard from (rank|pipeline stage) 1 for [0-9.]+ s"
UNWRITTEN = "the monitor cannot write .*monitor.jsonl, so looks are missing there: .*"
PLACE = r" \(monitor_faults.py, line [0-9]+\)"

#: (fault, rank) -> the lines of rank 0, and those of rank 1.
FAULTS: dict[tuple[str, int], tuple[list[str], list[str]]] = {
    ("none", 0): ([], []),
    **{
        (fault, rank): ([f"{ENDED}on rank {rank} it failed with ValueError: injected{PLACE}"], [])
        for fault, rank in (("look", 0), ("look", 1), ("hook", 1), ("read", 1), ("file", 0))
    },
    ("store", 0): ([f"{ENDED}on rank 0 it failed with RuntimeError: injected: Broken pipe{PLACE}{UNTOLD}"], []),
    ("store", 1): ([UNHEARD], [f"{ENDED}on rank 1 it failed with RuntimeError: injected: Broken pipe{PLACE}{UNTOLD}"]),
    ("silent", 1): ([UNHEARD], []),
    ("a file in the folder's place", 0): ([UNWRITTEN], []),
    ("writers", 1): (
        [],
        [f"the monitor cannot write to {name}: RuntimeError: injected: Broken pipe" for name in ("TensorBoard", "W&B")],
    ),
}
#: What befalls the model itself, and is there without the monitor as well. A NaN spreads until the next look.
BEGIN = "the monitor found values that are not finite, since step 2: "
CAST = "cast of every expert_bias"
VALUES: dict[tuple[str, int], tuple[list[str], list[str]]] = {
    ("NaN in weight", 1): (
        [f"{BEGIN}layer 2, weight: 3; nothing is stopped", ".* since step 4: layer 1, weight: .*"],
        [],
    ),
    ("infinity in expert_bias", 1): ([f"{BEGIN}layer 2, expert_bias: 1; nothing is stopped"], []),
    (CAST, 1): (["the monitor found routers that are no longer in fp32: layer ., .*: expert_bias is bfloat16.*"], []),
}


def scenes(layout: str, folder: Path) -> list[dict[str, Any]]:
    """The training without the monitor and with it, for every fault."""
    (folder / "taken").touch()
    found: list[dict[str, Any]] = []

    def add(
        recipe: dict[str, Any], fault: str, rank: int, dense_stage: bool = False, settings: Sequence[str] = ()
    ) -> None:
        without = [""] if fault == "none" or (fault, rank) in VALUES else []
        for on_mismatch in settings or [*without, "raise", "warn"]:
            place = folder / ("taken" if "folder" in fault else str(len(found)))
            scene = {"fault": fault, "rank": rank, "on_mismatch": on_mismatch, "folder": str(place)}
            found.append({**scene, "recipe": recipe, "dense_stage": dense_stage})

    # Under `raise` it would stop the training: tests/test_monitor_ranks.py.
    add({}, CAST, 1, settings=["warn"])
    for recipe in (AUX, {}):
        for fault, rank in [key for key in (*FAULTS, *VALUES) if key != (CAST, 1)]:
            if not ("expert_bias" in fault and recipe):
                add(recipe, fault, rank)
    if layout == "pipeline":
        add({}, "none", 0, dense_stage=True)
        add({}, "look", 1, dense_stage=True)
    return found


@pytest.mark.parametrize("layout", ["data", "pipeline"])
def test_whatever_fails_in_the_monitor_the_training_is_that_without_it_and_is_told_why(
    layout: str, tmp_path: Path
) -> None:
    played = scenes(layout, tmp_path)
    ranks = lab.run_ranks(
        "monitor_faults:play",
        lab.Recipe(**{f"{layout}_parallel": 2}, **TINY),
        {"scenes": played, "patience": PATIENCE},
        megatron=bootstrap.ensure_release(bootstrap.NEWEST),
        plugin=True,
        python_path=[PROGRAMS],
        logs=tmp_path,
    )
    without: dict[str, list[str]] = {}
    for number, scene in enumerate(played):
        outcomes, key = [rank[number] for rank in ranks], (scene["fault"], scene["rank"])
        like = repr((scene["recipe"], scene["dense_stage"], key in VALUES and key))
        bits = [outcome["bits"] for outcome in outcomes]
        assert without.setdefault(like, bits) == bits, scene
        assert scene["on_mismatch"] or not any(outcome["lines"] for outcome in outcomes)
        for outcome, expected in zip(outcomes, {**FAULTS, **VALUES}[key], strict=True):
            assert outcome["seconds"] < LIMIT, scene
            lines = [line for line in outcome["lines"] if "the monitor" in line]
            wanted = expected if scene["on_mismatch"] else []
            assert len(lines) == len(wanted), (scene, lines)
            assert all(re.fullmatch(*pair) for pair in zip(wanted, lines, strict=True)), (scene, lines)
            if any(line.startswith(ENDED) for line in lines):
                assert not any(outcome["hooks"]), scene
        if scene["on_mismatch"] and key == ("none", 0):
            file = Path(scene["folder"]) / "monitor.jsonl"
            assert {json.loads(line)["step"] for line in file.read_text().splitlines()} == {2, 4}
    assert len(set(map(tuple, without.values()))) == len(without)
