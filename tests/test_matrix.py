"""The last word of scripts/test: did everything run that had to, on every release, with nothing skipped?

It reads what the run has left in results/: run.json, and one ledger per release or checkout (see ledger.py).
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import browser
import docs_resume
import pytest
from bootstrap import LAST_OF_LINE, TREES_IN_WHOLE
from defects import DEFECTS, defects_of, state_on

from megatron_fp32_router.patching.records import PATCHES

RESULTS = Path(__file__).resolve().parent.parent / "results"

#: A release on which fewer tests ran has lost some: they would not be missed otherwise. Every release is asked for its
#: defects, the last of a line for the rest too.
FEWEST_TESTS, FEWEST_ON_THE_LAST = 24, 85

#: Of a checkout: `check`, and a training with the plugin and without; and on a few, saving and resuming.
FEWEST_ON_A_TREE, FEWEST_IN_WHOLE = 3, 15


def read(name: str) -> Any:
    path = RESULTS / f"{name}.json"
    assert path.exists(), f"{path} is missing: that part has not run to its end. scripts/test writes it."
    return json.loads(path.read_text(encoding="utf-8"))


RUN = read("run") if (RESULTS / "run.json").exists() else None


def test_the_run_has_reached_its_end_and_every_step_of_it_passed() -> None:
    assert RUN is not None, "results/run.json is missing: this file is for scripts/test"
    assert RUN["failed"] == []


# Tests for what was not asked for do not exist, so that nothing here is skipped either.
if RUN is not None:
    RELEASES_RUN = [f"middle-{release}" if RUN["middle"] else release for release in RUN["releases"]]
    PARTS = [*RELEASES_RUN, *RUN["trees"], *(["independent"] if RUN["independent"] else [])]

    @pytest.mark.parametrize("part", PARTS)
    def test_nothing_failed_or_was_skipped_in(part: str) -> None:
        ledger = read(part)
        release = None if part == "independent" else part.removeprefix("middle-")
        assert ledger["release"] == release or part in RUN["trees"]
        assert ledger["broken"] == []
        ended = {name: test["outcome"] for name, test in ledger["tests"].items()}
        assert {name: outcome for name, outcome in ended.items() if outcome != "passed"} == {}

    def test_something_was_tested() -> None:
        assert sum(len(read(part)["tests"]) for part in PARTS) > 0

    def test_what_could_not_be_run_here_is_named() -> None:
        for why in RUN["not_run"].values():
            warnings.warn(f"not tested on a checkout: {why}", stacklevel=1)
        if RUN["independent"] and browser.found() is None:
            warnings.warn(browser.MISSING, stacklevel=1)


if RUN is not None and RUN["middle"]:

    def test_the_tables_of_docs_resume_are_what_both_runs_recorded() -> None:
        """Ask for the oldest and the newest line too, which `scripts/test` has resumed."""
        assert docs_resume.main(["--check"]) == 0, "docs/resume.md is stale: run scripts/docs_resume.py"


if RUN is not None and not RUN["selected"]:

    @pytest.mark.parametrize("tree", RUN["trees"])
    def test_no_tests_are_missing_on_the_checkout(tree: str) -> None:
        assert len(read(tree)["tests"]) >= (FEWEST_IN_WHOLE if tree in TREES_IN_WHOLE else FEWEST_ON_A_TREE)


if RUN is not None and not RUN["selected"] and not RUN["middle"]:

    @pytest.mark.parametrize("release", RUN["releases"])
    def test_no_tests_are_missing_on(release: str) -> None:
        whole = release in LAST_OF_LINE and not RUN["quick"]
        assert len(read(release)["tests"]) >= (FEWEST_ON_THE_LAST if whole else FEWEST_TESTS)

    @pytest.mark.parametrize("release", RUN["releases"])
    def test_every_defect_was_shown_and_is_gone_on(release: str) -> None:
        tests = [test for test in read(release)["tests"].values() if test["outcome"] == "passed"]
        missing = [
            f"{name} was not {what}: {DEFECTS[name].says}"
            for name in sorted(defects_of(release), key=lambda name: int(name[1:]))
            for mark, what in (("shows", "shown with the plugin off"), ("repairs", "seen gone with it on"))
            if not any(name in test.get(mark, ()) for test in tests)
        ]
        assert missing == []

    @pytest.mark.parametrize("release", RUN["releases"])
    def test_no_patch_is_called_needed_where_none_of_its_defects_shows_on(release: str) -> None:
        shown = {
            name
            for test in read(release)["tests"].values()
            if test["outcome"] == "passed"
            for name in test.get("shows", ())
        }
        unfounded = [
            patch.id
            for patch in PATCHES
            if patch.repairs and state_on(patch, release) == "needed" and not shown & set(patch.repairs)
        ]
        assert unfounded == []
