"""Tests that need one GPU: `python -m pytest tests/gpu --megatron TREE`. No network, no second process.

They are no part of scripts/test. On a machine without a GPU every one of them is skipped, the summary says so in a
line of its own, and the exit code is 5 ("no tests ran"), so that nobody takes the run for a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fp32_router import lab

HERE = Path(__file__).parent
NONE = "no CUDA device on this machine: GPU TESTS DID NOT RUN"


def _cuda() -> bool:
    return torch.cuda.is_available() and not lab.cpu.is_pretending()


def _ours(item: pytest.Item) -> bool:
    return HERE in item.path.parents


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if _ours(item)]
    if not _cuda():
        for item in mine:
            item.add_marker(pytest.mark.skip(reason=NONE))
    elif mine and not config.getoption("--megatron"):
        raise pytest.UsageError("tests/gpu needs --megatron TREE: the folder that holds a Megatron as megatron/")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _cuda():
        terminalreporter.write_line(f"tests/gpu: {NONE}", red=True, bold=True)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    items = getattr(session, "items", [])
    if exitstatus == 0 and not _cuda() and items and all(map(_ours, items)):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def make() -> Iterator[Callable[..., Any]]:
    """`make(lab.build, **recipe)`, `make(lab.make_router, **recipe)`: in process groups that end with the test."""
    with ExitStack() as stack:

        def build(what: Callable[..., Any], **fields: Any) -> Any:
            stack.close()
            recipe = lab.Recipe(**fields)
            stack.enter_context(lab.parallel(recipe))
            return what(recipe if what is lab.build else lab.make_config(recipe))

        yield build
