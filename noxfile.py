"""The steps of scripts/test, to be run singly too: `nox -s lint`, `nox -s "release(0.16.1)" -- -k gating`.

All of them use the environment that nox itself runs in (.venv, made by scripts/test): Megatron releases
differ in what is on the path, not in what is installed.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

import browser  # noqa: E402
from bootstrap import (  # noqa: E402 - neither folder is a package
    LAST_OF_LINE,
    MIDDLE,
    OTHER_OPTIMIZERS,
    RELEASES,
    TREES,
    TREES_BY_HAND,
    TREES_IN_WHOLE,
    ensure_release,
    ensure_tree,
)
from installing import VERSIONS, pythons  # noqa: E402

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "independent"]

#: Scripts without a suffix: ruff and mypy have to be told that they are Python.
SCRIPTS = [
    str(path.relative_to(ROOT)) for path in sorted((ROOT / "scripts").iterdir()) if path.is_file() and not path.suffix
]

#: Of tests/megatron, what is run on the checkout of main that runs every test of tests/trees: recipes and optimizers.
ON_MAIN = [f"tests/megatron/test_{name}.py" for name in ("recipes", "muon", "optimizer_step", "refusals")]

#: What `scripts/test --quick` runs.
QUICK = [
    f"tests/megatron/test_{name}.py"
    for name in ("defects", "casts", "gating", "balance", "patches", "ranks", "optimizer_checkpoints", "refusals")
]

#: scripts/test sets the number of processes. One that has run out of tests takes over some of another's (worksteal).
WORKERS = os.environ.get("TEST_WORKERS", "2")
PYTEST = ("-m", "pytest", "-q", "-n", WORKERS, "--dist", "worksteal", "--durations", "5", "--disable-warnings")


@nox.session
def lint(session: nox.Session) -> None:
    """Style of every Python file."""
    session.run(sys.executable, "-m", "ruff", "check", ".", *SCRIPTS)
    session.run(sys.executable, "-m", "ruff", "format", "--check", ".", *SCRIPTS)


@nox.session
def types(session: nox.Session) -> None:
    """Types of what is installed, and of each script."""
    session.run(sys.executable, "-m", "mypy", "--strict", "megatron_fp32_router", "_megatron_fp32_router_startup.py")
    for script in SCRIPTS:
        # One by one: every one of them is a module named __main__.
        session.run(
            sys.executable, "-m", "mypy", "--strict", script, env={"MYPYPATH": os.pathsep.join(("scripts", "tests"))}
        )


@nox.session
def independent(session: nox.Session) -> None:
    """Tests that do not depend on the release."""
    missing = [version for version in VERSIONS if version not in pythons()]
    session.log(f"The wheel is tried on the Pythons found here: {', '.join(pythons())}")
    session.log(f"Not found here, so not tried: {', '.join(missing) or 'none'}")
    if importlib.util.find_spec("ray") is None:
        session.log("Ray is not installed here (pip install ray), so examples/ray is not run")
    selection = [f"--ignore=tests/{name}" for name in ("megatron", "trees", "downstream", "test_matrix.py", "gpu")]
    if browser.found() is None:
        session.log(f"{browser.MISSING}: tests/test_pages.py is run in part")
        selection += ["-m", "not in_browser"]
    _pytest(session, "independent", "tests", *selection)


@nox.session
@nox.parametrize("megatron", [nox.param(version, id=version) for version in RELEASES])
def release(session: nox.Session, megatron: str) -> None:
    """Tests on one release."""
    # Patch releases of a line behave alike: all of them run the tests of defects, and the last one all tests.
    tests = ["tests/megatron"] if megatron in LAST_OF_LINE else ["tests/megatron/test_defects.py"]
    if megatron in OTHER_OPTIMIZERS:
        tests += [f"tests/megatron/test_{name}.py" for name in ("optimizer_checkpoints", "mapping", "resume")]
    # scripts/test adds it for a release that is named.
    whole = ["--whole"] if megatron in (RELEASES[0], RELEASES[-1]) else []
    _pytest(session, megatron, *tests, "--megatron", str(ensure_release(megatron)), *whole)


@nox.session
@nox.parametrize("megatron", [nox.param(version, id=version) for version in MIDDLE])
def middle(session: nox.Session, megatron: str) -> None:
    """What `release` leaves out on a release: the tests marked whole."""
    tests = ["tests/megatron"] if megatron in LAST_OF_LINE else ["tests/megatron/test_resume.py"]
    where = ["--megatron", str(ensure_release(megatron)), "--whole", "-m", "whole"]
    _pytest(session, f"middle-{megatron}", *tests, *where)


@nox.session
@nox.parametrize("megatron", [nox.param(version, id=version) for version in (RELEASES[0], RELEASES[-1])])
def quick(session: nox.Session, megatron: str) -> None:
    """What the plugin promises at its core, on one release: the defects, seen and gone, and what repairs them."""
    _pytest(session, megatron, *QUICK, "--megatron", str(ensure_release(megatron)))


@nox.session
@nox.parametrize("name", [nox.param(name, id=name) for name in TREES])
def tree(session: nox.Session, name: str) -> None:
    """Tests on one checkout of the repository; on those whose core is no release's, that core's tests too."""
    # scripts/test adds it for a checkout that is named.
    whole = ["--whole"] if name in TREES_IN_WHOLE else []
    folders = ["tests/trees", "tests/megatron"] if name in TREES_BY_HAND else ["tests/trees"]
    folders += ON_MAIN if name in TREES_IN_WHOLE and name.startswith("main-") else []
    _pytest(session, name, *folders, "--megatron", str(ensure_tree(name)), *whole)


@nox.session
def patches(session: nox.Session) -> None:
    """The source patches of every line: they apply, behave as the plugin does, and come out again."""
    session.run(sys.executable, "scripts/patches", "verify", *session.posargs)


def _pytest(session: nox.Session, ledger: str, *arguments: str) -> None:
    """Run pytest with these arguments and the user's; what ran is recorded in results/LEDGER.json."""
    command = [*PYTEST, *arguments, "--ledger", str(ROOT / "results" / f"{ledger}.json"), *session.posargs]
    # A selection may leave no test here (5); test_matrix.py checks that some session had one.
    session.run(sys.executable, *command, success_codes=[0, 5] if session.posargs else [0])
