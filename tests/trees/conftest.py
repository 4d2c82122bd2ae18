"""Fixtures that start the unmodified pretrain_gpt.py of a checkout of the repository."""

from __future__ import annotations

from pathlib import Path

import pytest
from installing import Environment, build_wheel
from pretrain import TWO_RANKS, Program, Run, router_dtype


def pytest_sessionstart(session: pytest.Session) -> None:
    tree = session.config.getoption("--megatron")
    if not tree or not Path(tree, "pretrain_gpt.py").is_file():
        raise pytest.UsageError("tests/trees needs --megatron TREE, a checkout; `scripts/test` fetches those it knows")


@pytest.fixture(scope="session")
def tree(request: pytest.FixtureRequest) -> Path:
    """The checkout under test."""
    return Path(request.config.getoption("--megatron")).resolve()


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """A new environment with the plugin installed as users install it: its wheel, and nothing of this repository."""
    made = Environment.make(tmp_path_factory.mktemp("env") / "env")
    made.install(build_wheel(tmp_path_factory.mktemp("wheel")))
    made.borrow()
    return made


@pytest.fixture(scope="session")
def pretrain(tree: Path, environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Program:
    """`pretrain(name, …)`: four steps of its pretrain_gpt.py, or the last two of them."""
    return Program(tree, environment, tmp_path_factory.mktemp("pretrain"))


@pytest.fixture(scope="session")
def on(pretrain: Program) -> Run:
    """A training with the plugin, turned on by its variable alone."""
    return pretrain("on")


@pytest.fixture(scope="session")
def off(pretrain: Program) -> Run:
    """The same training without it."""
    return pretrain("off", plugin=False)


@pytest.fixture(scope="session")
def two_ranks(pretrain: Program) -> Run:
    """Two ranks with the plugin, with TWO_RANKS and router scores in fp64 where the release has them."""
    return pretrain("two-ranks", *TWO_RANKS, *router_dtype(pretrain.tree, "fp64"), ranks=2)
