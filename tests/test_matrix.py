"""The last word of scripts/test: did everything run that had to, on every release, with nothing skipped?

It reads what the run has left in results/: run.json, and one ledger per release (see ledger.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from defects import DEFECTS, defects_of

RESULTS = Path(__file__).resolve().parent.parent / "results"

#: A release on which fewer tests ran has lost some: they would not be missed otherwise.
FEWEST_TESTS = 20


def read(name: str) -> Any:
    path = RESULTS / f"{name}.json"
    assert path.exists(), f"{path} is missing: that part has not run to its end. scripts/test writes it."
    return json.loads(path.read_text(encoding="utf-8"))


#: Nothing but this file's own complaint is to be seen where scripts/test has not been running.
RUN = read("run") if (RESULTS / "run.json").exists() else {"releases": [], "failed": ["scripts/test itself"]}


def require_only_passes(ledger: Any) -> None:
    assert ledger["broken"] == []
    assert {name: test["outcome"] for name, test in ledger["tests"].items() if test["outcome"] != "passed"} == {}


def test_every_step_of_the_run_passed() -> None:
    assert RUN["failed"] == []


@pytest.mark.parametrize("release", RUN["releases"])
def test_nothing_failed_or_was_skipped_on(release: str) -> None:
    ledger = read(release)
    assert ledger["release"] == release
    require_only_passes(ledger)
    if not RUN["selected"]:
        assert len(ledger["tests"]) >= FEWEST_TESTS


@pytest.mark.parametrize("release", [] if RUN.get("selected") else RUN["releases"])
def test_every_defect_was_shown_and_is_gone_on(release: str) -> None:
    tests = [test for test in read(release)["tests"].values() if test["outcome"] == "passed"]
    missing = [
        f"{name} was not {what}: {DEFECTS[name].says}"
        for name in sorted(defects_of(release), key=lambda name: int(name[1:]))
        for mark, what in (("shows", "shown with the plugin off"), ("repairs", "seen gone with it on"))
        if not any(name in test.get(mark, ()) for test in tests)
    ]
    assert missing == []


@pytest.mark.parametrize("name", ["independent"] if RUN.get("independent") else [])
def test_nothing_failed_or_was_skipped_among_tests_of_no_release(name: str) -> None:
    require_only_passes(read(name))


def test_something_was_tested() -> None:
    names = [*RUN["releases"], *(["independent"] if RUN.get("independent") else [])]
    assert sum(len(read(name)["tests"]) for name in names) > 0
