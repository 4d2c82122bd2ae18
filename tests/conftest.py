"""One process tests one Megatron: the tree given by --megatron, unmodified, in the laboratory.

Importing the plugin arms it, so it is disarmed here at once: every test starts with upstream's own functions, and
one that wants the plugin says so with the `plugin` fixture.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# What vouches for a tree that is no release stays: such a tree can be tested only with it.
for name in [name for name in os.environ if name.startswith("MEGATRON_FP32_ROUTER")]:
    if name != "MEGATRON_FP32_ROUTER_ACCEPTED":
        del os.environ[name]

import ledger  # noqa: E402
from ledger import pytest_addoption, pytest_collection_modifyitems  # noqa: E402, F401

import megatron_fp32_router  # noqa: E402

megatron_fp32_router.disable()


def pytest_configure(config: pytest.Config) -> None:
    ledger.pytest_configure(config)
    tree = config.getoption("--megatron")
    # tests/trees starts programs of its own, which import their own Megatron.
    if tree and not all("tests/trees" in argument for argument in config.args):
        from megatron_fp32_router import lab

        lab.prepare(tree)


def pytest_report_header(config: pytest.Config) -> str:
    tree = config.getoption("--megatron")
    release = f"megatron-core {ledger.release_of(Path(tree))}" if tree else "no Megatron: release-independent tests"
    apart = (
        ""
        if any("tests/gpu" in argument for argument in config.args)
        else "; tests/gpu are run by themselves, on a GPU"
    )
    return f"{release}{apart}"


@pytest.fixture
def plugin(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """The plugin, on for this test; calling the fixture's value turns it on again with other settings.

    With --patched it stays off: the tree under test is to pass the same test by its own source.
    """
    if request.config.getoption("--patched"):
        yield lambda **_: None
        return
    megatron_fp32_router.enable()
    yield megatron_fp32_router.enable
    megatron_fp32_router.disable()
