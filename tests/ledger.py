"""What was tested: which tests ran on which release, and which defects they showed or saw repaired.

A test says `@pytest.mark.shows("D6")` where the defect is to be seen with the plugin off, and
`@pytest.mark.repairs("D6")` where it is to be gone with the plugin on. On a release that has none of the
defects a test names, it is not collected at all: nothing is ever skipped. Nor is a dear test collected elsewhere that
says `@pytest.mark.on_lines("0.11", "0.19")`: it covers all release lines by those that differ. scripts/test keeps one
ledger file per release, and test_matrix.py reads them at the end. conftest.py imports the hooks below.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from defects import DEFECTS, LINES, defects_of
from packaging.version import Version

_MARKS = ("shows", "repairs")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--megatron", metavar="TREE", help="folder that holds the release under test as megatron/")
    parser.addoption("--patched", action="store_true", help="TREE has the source patches: test it without the plugin")
    parser.addoption("--whole", action="store_true", help="run those too that few releases and checkouts run")
    parser.addoption("--ledger", metavar="FILE", help="write which tests ran, and how they ended, to FILE")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "shows(*defects): with the plugin off, these defects are to be seen")
    config.addinivalue_line("markers", "repairs(*defects): with the plugin on, these defects are gone")
    config.addinivalue_line("markers", "on_lines(*lines): collected on these release lines only")
    config.addinivalue_line("markers", "since(release): what this is about came with that release")
    config.addinivalue_line("markers", "whole: collected with --whole only, which scripts/test gives to few")
    config.addinivalue_line("markers", "in_browser: needs a Chromium; left out by scripts/test where there is none")
    path = config.getoption("--ledger")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Ledger(Path(path), config.getoption("--megatron")))


def release_of(tree: Path) -> str:
    """The version of the Megatron in *tree*, read and not imported: importing it runs git."""
    package_info = ast.parse((tree / "megatron" / "core" / "package_info.py").read_text(encoding="utf-8"))
    numbers = {
        node.targets[0].id: node.value.value
        for node in package_info.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    return f"{numbers['MAJOR']}.{numbers['MINOR']}.{numbers['PATCH']}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of what the release does not have; note on the others which defects they are about."""
    tree = config.getoption("--megatron")
    release = release_of(Path(tree)) if tree else ""
    present = defects_of(release) if tree else frozenset(DEFECTS)
    line = release.rpartition(".")[0]
    line = line if line in LINES else LINES[-1]  # one that is newer than all
    kept, left_out = [], []
    for item in items:
        named = {mark: _named(item, mark) for mark in _MARKS}
        about = set().union(*named.values())
        lines = {line for marker in item.iter_markers("on_lines") for line in marker.args}
        since = [Version(mark.args[0]) for mark in item.iter_markers("since")]
        elsewhere = (lines and line not in lines) or (release and since and Version(release) < max(since))
        elsewhere = elsewhere or ("whole" in item.keywords and not config.getoption("--whole"))
        if (about and not about & present) or elsewhere:
            left_out.append(item)
            continue
        kept.append(item)
        item.user_properties += [(mark, sorted(ids & present)) for mark, ids in named.items() if ids & present]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def _named(item: pytest.Item, mark: str) -> set[str]:
    ids = {name for marker in item.iter_markers(mark) for name in marker.args}
    if not ids <= DEFECTS.keys():
        raise pytest.UsageError(f"{item.nodeid} names unknown defects: {sorted(ids - DEFECTS.keys())}")
    return ids


class Ledger:
    """Collects reports. Under xdist only the controller has one: the workers' reports arrive there."""

    def __init__(self, path: Path, tree: str | None) -> None:
        self.path = path
        self.release = release_of(Path(tree)) if tree else None
        self.tests: dict[str, dict[str, Any]] = {}
        self.broken: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        entry = self.tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        entry["seconds"] = round(entry["seconds"] + report.duration, 2)
        entry.update(dict(report.user_properties))
        if report.outcome != "passed":
            entry["outcome"] = report.outcome

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        # A file that cannot be imported, or that skips itself as a whole.
        if report.outcome != "passed" and report.nodeid not in self.broken:
            self.broken.append(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"release": self.release, "tests": self.tests, "broken": self.broken}
        self.path.write_text(json.dumps(content, indent=1), encoding="utf-8")
