"""A Megatron in which one patched function has another name: an error, or a warning and a training."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).resolve().parents[1] / "programs" / "renamed.py"


def link(source: str, target: str) -> None:
    """As a hard link, where source and target are on one file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


# Half a minute of processor time each. Between them these have every patched function, as 0.15 to 0.18 have it too.
@pytest.mark.whole
@pytest.mark.on_lines("0.11", "0.14", "0.19")
def test_every_renamed_function_is_named_in_an_error_or_in_a_warning_and_the_training_goes_on(
    request: pytest.FixtureRequest, tmp_path: Path, release: Any
) -> None:
    tree = Path(request.config.getoption("--megatron"))
    shutil.copytree(tree / "megatron", tmp_path / "megatron", copy_function=link)
    done = subprocess.run(
        [sys.executable, PROGRAM, tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"gating", "bias-rule", "bias-rule-in-finalize", "bias-update", "wrap-check"} <= found.keys()
    # Without ours for the gating, weights are left to Megatron; buffers are not.
    assert found["gating"]["warn"]["biases"] == ["torch.float32"]
    (products,) = found["gating"]["warn"]["products"]
    assert products.startswith("the products of others: the target does not exist")
    for seen in found.values():
        refused, warned = seen["raise"], seen["warn"]
        if refused["error"] == "ImportError":
            # Megatron itself imports it by this name, and says so before the plugin can.
            assert f"cannot import name '{seen['target'].rpartition('.')[2]}'" in refused["message"], seen
            assert not seen["trains"], seen
            continue
        # Changed: a function that calls the renamed one is patched or relied on too, and was looked at before it.
        assert refused["error"] in ("TargetMissingError", "TargetChangedError"), seen
        what = seen["target"] if refused["error"] == "TargetMissingError" else f"check --megatron {tmp_path} --accept"
        for part in (what, str(release), "MEGATRON_FP32_ROUTER_ON_MISMATCH=warn"):
            assert part in refused["message"], seen
        assert "error" not in warned, seen
        assert warned["state"] == "drifted", seen
        # One line for the patch itself, and one for each that relies on the renamed function or goes with the patch.
        assert sum(f"{seen['target']} does not exist" in line and seen["why"] in line for line in warned["said"]) == 1
        assert len(set(warned["said"])) == len(warned["said"])
        if seen["trains"]:
            assert math.isfinite(warned["loss"])
