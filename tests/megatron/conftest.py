"""Fixtures that build real Megatron objects of the release under test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from bootstrap import NEWEST
from ledger import release_of
from packaging.version import Version

from megatron_fp32_router import lab

#: The oldest, with formats of its own, and the first of those that have today's; the newest release comes on top.
AUDITED = ("0.11.0", "0.16.1")


def pytest_sessionstart(session: pytest.Session) -> None:
    if not session.config.getoption("--megatron"):
        raise pytest.UsageError("tests/megatron needs --megatron TREE; `scripts/test` fetches the releases")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The audit reads files: one release of each way to write them is enough, and they take seconds to write."""
    tree = config.getoption("--megatron")
    if collection_path.name == "test_audit.py" and tree and release_of(Path(tree)) not in (*AUDITED, NEWEST):
        return True
    return None


@pytest.fixture(scope="session")
def release(request: pytest.FixtureRequest) -> Version:
    """The release under test."""
    return Version(release_of(Path(request.config.getoption("--megatron"))))


@pytest.fixture(scope="session")
def with_bias(release: Version) -> bool:
    """Whether this release's router has a `bias` parameter when add_bias_linear is on (0.12 to 0.14 refuse it)."""
    return release >= Version("0.15")


@pytest.fixture
def build() -> Iterator[Callable[..., lab.Lab]]:
    """`build(**recipe)`: a tiny GPT-MoE, wrapped, with DDP and an optimizer, ready to train."""
    with ExitStack() as stack:

        def make(**fields: Any) -> lab.Lab:
            stack.close()
            recipe = lab.Recipe(**fields)
            stack.enter_context(lab.parallel(recipe))
            return lab.build(recipe)

        yield make


@pytest.fixture
def router() -> Iterator[Callable[..., Any]]:
    """`router(**recipe)`: one TopKRouter outside any model, as its constructor leaves it."""
    with ExitStack() as stack:

        def make(**fields: Any) -> Any:
            stack.close()
            recipe = lab.Recipe(**fields)
            stack.enter_context(lab.parallel(recipe))
            return lab.make_router(lab.make_config(recipe))

        yield make
