"""Fixtures that start the unmodified pretrain_gpt.py of a checkout of the repository."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from installing import Environment, build_wheel
from pretrain import Run, run


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


@pytest.fixture
def pretrain(tree: Path, environment: Environment, tmp_path: Path) -> Callable[..., Run]:
    """`pretrain(plugin, ranks, *arguments)`: five steps of its pretrain_gpt.py."""
    return lambda plugin, ranks, *arguments: run(tree, environment, tmp_path, plugin, ranks, arguments)
