"""The probe on the release under test: every promise holds, and it ran what it is there to clear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bootstrap import ensure_transformer_engine

from megatron_fp32_router import lab
from megatron_fp32_router.compat import probe_areas
from megatron_fp32_router.compat.probe_run import PROMISES, RECIPE, prove

# The answers are the same on the lines in between.
pytestmark = pytest.mark.on_lines("0.11", "0.16", "0.19")


@pytest.mark.whole
def test_every_promise_of_two_ranks_holds_and_what_is_left_out_is_said(request: Any, tmp_path: Path) -> None:
    tree = Path(request.config.getoption("--megatron")).resolve()
    optimizer = str(tree / "megatron/core/optimizer/distrib_optimizer.py")
    arguments = {
        **{name: str(tmp_path / name) for name in ("progress", "done")},
        "files": [optimizer],
        "areas": sorted(probe_areas.AREAS),
        "transformer_engine": str(ensure_transformer_engine()),
    }
    ranks = lab.run_ranks(
        "megatron_fp32_router.compat.probe_areas:prove", probe_areas.RECIPE, arguments, megatron=tree, plugin=True
    )
    for rank in ranks:
        assert [proof for proof in rank["proofs"] if proof[1] is False] == []
        # Formats that the release itself cannot load, and an optimizer that it does not have.
        left_out = [why for _, holds, why in rank["proofs"] if holds is None]
        assert all(why.startswith("this Megatron ") for why in left_out), left_out
        assert {name.partition(":")[0] for name, holds, _ in rank["proofs"] if holds} >= {"optimizer", "distributed"}
        assert {name for name, _ in rank["ran"][optimizer]} >= {"__init__", "load_state_dict", "save_parameter_state"}


def test_every_promise_holds_and_the_functions_that_matter_ran(request: Any, plugin: Any, tmp_path: Path) -> None:
    tree = Path(request.config.getoption("--megatron")).resolve()
    router, utils, finalize = (
        str(tree / "megatron/core" / name)
        for name in ("transformer/moe/router.py", "transformer/moe/moe_utils.py", "distributed/finalize_model_grads.py")
    )
    with lab.parallel(RECIPE):
        told = {name: str(tmp_path / name) for name in ("progress", "done")}
        arguments = {**told, "files": [router, utils, finalize], "areas": list(PROMISES)}
        found = prove(RECIPE, arguments)
    # The oldest release has no inference router and no offload, which are left out there.
    assert [name for name, holds, _ in found["proofs"] if holds is False] == []
    assert {name for name, _, _ in found["proofs"]} == {name for promises in PROMISES.values() for name in promises}
    assert found["proofs"][-1][0] == "upstream"
    ran = {file: {name for name, _ in functions} for file, functions in found["ran"].items()}
    # Also upstream's own functions, with which the last promise compares.
    assert ran[router] >= {"__init__", "gating", "routing", "forward"}
    assert "get_updated_expert_bias" in ran[utils]
    assert ran[finalize] >= {"finalize_model_grads", "_update_router_expert_bias"}
