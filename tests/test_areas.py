"""What a job does not use does not stop it: a changed optimizer is refused when it is built, and nowhere else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bootstrap import NEWEST, ensure_release

from megatron_fp32_router import lab

ROOT = Path(__file__).resolve().parent.parent
OPTIMIZER = "megatron/core/optimizer/distrib_optimizer.py"

PROGRAM = """
import json, sys
from pathlib import Path
import megatron_fp32_router as plugin
from megatron_fp32_router import lab
from megatron_fp32_router.patching.records import PATCHES

plugin.disable()
lab.prepare(Path(sys.argv[1]))
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
untouched = vars(DistributedOptimizer)["__init__"]
TINY = {"layers": 1, "hidden": 16, "moe_ffn": 16, "seq_length": 16}
cores = {patch.id for patch in PATCHES if patch.area == "router"}

def trains(**fields):
    recipe = lab.Recipe(**TINY, **fields)
    with lab.parallel(recipe):
        room = lab.build(recipe)
        return room.step(lab.text_batches(recipe, seed=1))

def tries(**fields):
    try:
        return trains(**fields)
    except plugin.Fp32RouterError as error:
        return [type(error).__name__, str(error)]

found = {}
plugin.enable()
found["plain"] = tries()
found["distributed"] = tries(optimizer="distributed", fused_adam=True)
plugin.enable(on_mismatch="raise")  # once more: nothing is put in place twice
states = {record.id: (record.state, record.detail) for record in plugin.status()}
found["optimizer"] = states["optimizer-mixed-groups"]
found["core"] = sorted({states[name][0] for name in cores} - {"armed"})
plugin.disable()
found["undone"] = vars(DistributedOptimizer)["__init__"] is untouched
plugin.enable(on_mismatch="raise", protect="buffers")
found["buffers"] = tries(optimizer="distributed", fused_adam=True)
plugin.disable()
plugin.enable(on_mismatch="warn", protect="all")
found["warn"] = tries(optimizer="distributed", fused_adam=True)
states = {record.id: (record.state, record.detail) for record in plugin.status()}
found["optimizer under warn"] = states["optimizer-mixed-groups"]
found["core under warn"] = sorted({states[name][0] for name in cores} - {"armed"})
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """The program, run on a release whose distributed optimizer has one statement more."""
    tree = tmp_path_factory.mktemp("changed")
    shutil.copytree(ensure_release(NEWEST) / "megatron", tree / "megatron")
    text = (tree / OPTIMIZER).read_text(encoding="utf-8")
    old = "        self.is_stub_optimizer = False\n"
    assert text.count(old) == 1
    (tree / OPTIMIZER).write_text(text.replace(old, f"{old}        self.something_new = None\n"), encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MEGATRON_FP32_ROUTER")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tree)],
        env={**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


@pytest.fixture(scope="module")
def found(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_job_that_does_not_use_it_trains_and_its_routers_are_patched(found: dict[str, Any]) -> None:
    assert isinstance(found["plain"], float)
    assert found["core"] == ["applied", "native"]


def test_a_job_that_uses_it_is_stopped_when_it_is_built_and_told_why(found: dict[str, Any]) -> None:
    name, message = found["distributed"]
    assert name == "TargetChangedError"
    for part in ("DistributedOptimizer.__init__ has changed", OPTIMIZER, "--accept", "_ON_MISMATCH=warn"):
        assert part in message
    state, detail = found["optimizer"]
    assert state == "drifted"
    assert detail.endswith("; refused where it is used")


def test_without_fp32_router_parameters_there_is_nothing_to_refuse(found: dict[str, Any]) -> None:
    assert isinstance(found["buffers"], float)


def test_disable_puts_the_identical_function_back(found: dict[str, Any]) -> None:
    assert found["undone"]


def test_under_warn_it_trains_and_says_so_once_and_every_core_patch_is_applied(
    found: dict[str, Any], done: subprocess.CompletedProcess[str]
) -> None:
    assert isinstance(found["warn"], float)
    assert found["core under warn"] == ["applied", "native"]
    state, detail = found["optimizer under warn"]
    assert state == "drifted"
    assert detail.endswith("; left out with a warning where it is used")
    said = [line for line in done.stderr.splitlines() if "DistributedOptimizer.__init__ has changed" in line]
    assert len(said) == 1


def test_a_changed_checkpoint_function_is_refused_when_it_saves_after_the_ranks_have_agreed(tmp_path: Path) -> None:
    shutil.copytree(ensure_release(NEWEST) / "megatron", tmp_path / "megatron")
    text = (tmp_path / OPTIMIZER).read_text(encoding="utf-8")
    name = "sharded_param_state_fully_reshardable"
    start = text.index('"""', text.index('"""', text.index(f"def {name}(")) + 3) + 3
    changed = f"{text[:start]}\n        something_new = None{text[start:]}"
    (tmp_path / OPTIMIZER).write_text(changed, encoding="utf-8")
    recipe = lab.Recipe(layers=1, hidden=16, moe_ffn=16, seq_length=16, data_parallel=2, optimizer="distributed")
    said = lab.run_ranks(
        "drifted_save:train_and_save",
        recipe,
        {"folder": str(tmp_path / "checkpoint")},
        plugin=True,
        megatron=tmp_path,
        python_path=[ROOT / "tests" / "programs"],
    )
    for rank in said:
        assert rank, "the checkpoint was saved"
        assert rank[0] == "TargetChangedError"
        assert f"{name} has changed" in rank[1]
