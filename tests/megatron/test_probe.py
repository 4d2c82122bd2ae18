"""The probe on the release under test: every promise holds, and it ran what it is there to clear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_fp32_router import lab
from megatron_fp32_router.compat.probe_run import PROMISES, RECIPE, prove

# What is asked here is alike on the lines in between.
pytestmark = pytest.mark.on_lines("0.11", "0.16", "0.19")


def test_every_promise_holds_and_the_functions_that_matter_ran(request: Any, plugin: Any, tmp_path: Path) -> None:
    tree = Path(request.config.getoption("--megatron")).resolve()
    router, utils, finalize = (
        str(tree / "megatron/core" / name)
        for name in ("transformer/moe/router.py", "transformer/moe/moe_utils.py", "distributed/finalize_model_grads.py")
    )
    with lab.parallel(RECIPE):
        found = prove(RECIPE, {"progress": str(tmp_path / "progress"), "files": [router, utils, finalize]})
    assert [name for name, holds, _ in found["proofs"] if not holds] == []
    assert [name for name, _, _ in found["proofs"]] == list(PROMISES)
    ran = {file: {name for name, _ in functions} for file, functions in found["ran"].items()}
    # Also upstream's own versions of what we replace: they are the oracle of the last promise.
    assert ran[router] >= {"__init__", "gating", "routing", "forward"}
    assert "get_updated_expert_bias" in ran[utils]
    assert ran[finalize] >= {"finalize_model_grads", "_update_router_expert_bias"}
