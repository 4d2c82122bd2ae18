"""megatron.legacy lies in checkouts of the repository and in no wheel: Float16Module to 0.11, its file to 0.17.

Only what it takes to be found is made up here; tests/trees trains on whole checkouts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checking import Copy, check, copier, states

from megatron_fp32_router.cli import main

ROOT = Path(__file__).resolve().parent.parent
MODULE = "megatron/legacy/model/module.py"
WITHOUT = "class MegatronModule:\n    pass\n"
WITH = "class Float16Module:\n    def __init__(self, module, args): ...\n"
RENAMED = "class Float16Module:\n    def wrap(self, module, args): ...\n"

PROGRAM = """
import megatron.legacy.model.module
import megatron_fp32_router
print([record.state for record in megatron_fp32_router.status() if record.id == "legacy-wrap-check"])
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Copy:
    """`checkout(release, text)`: what `check` reads of a release, with a megatron.legacy.model.module of that text."""
    copy = copier(tmp_path)

    def make(release: str, text: str) -> Path:
        tree = copy(release)
        (tree / MODULE).parent.mkdir(parents=True)
        (tree / MODULE).write_text(text, encoding="utf-8")
        return tree

    return make


def imported(tree: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MEGATRON_FP32_ROUTER")}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**environment, "PYTHONPATH": os.pathsep.join((str(tree), str(ROOT))), "MEGATRON_FP32_ROUTER": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("release", ["0.12.3", "0.16.1", "0.17.1"])
def test_a_checkout_whose_legacy_module_has_no_such_class_fits(checkout: Copy, release: str, capsys: Any) -> None:
    code, report = check(capsys, "--megatron", checkout(release, WITHOUT), "--pin", release)
    assert (code, report["verdict"], states(report)) == (0, "fits", {})


def test_its_import_does_not_stop_a_training_and_status_says_why_nothing_is_patched(checkout: Copy) -> None:
    done = imported(checkout("0.16.1", WITHOUT))
    assert (done.stdout, done.stderr) == ("['native']\n", "")


def test_the_doctor_says_that_there_is_no_such_function(checkout: Copy, capsys: Any) -> None:
    main(["doctor", "--json", "--megatron", str(checkout("0.16.1", WITHOUT))])
    (found,) = [p for p in json.loads(capsys.readouterr().out)["patches"] if p["id"] == "legacy-wrap-check"]
    assert (found["state"], found["detail"]) == ("n/a", "has no such function")


@pytest.mark.parametrize("release", ["0.11.0", "0.16.1"])
def test_where_the_class_is_there_it_is_patched_whatever_the_version(checkout: Copy, release: str, capsys: Any) -> None:
    tree = checkout(release, WITH)
    assert check(capsys, "--megatron", tree)[0] == 0
    done = imported(tree)
    assert (done.stdout, done.stderr) == ("['applied']\n", "")


def test_a_class_that_has_lost_its_constructor_is_still_an_error(checkout: Copy, capsys: Any) -> None:
    tree = checkout("0.11.0", RENAMED)
    assert check(capsys, "--megatron", tree)[0] == 1
    assert "Float16Module.__init__ does not exist" in imported(tree).stderr
