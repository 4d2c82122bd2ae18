"""Fixtures that build real Megatron objects of the release under test."""

from __future__ import annotations

import json
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
    """The audit reads files: one release of each way to write them is enough, and they take seconds to write.

    The arithmetic that `predict` simulates has one form before 0.12 and one after.
    """
    tree = config.getoption("--megatron")
    if (
        collection_path.name in ("test_audit.py", "test_predict.py")
        and tree
        and release_of(Path(tree)) not in (*AUDITED, NEWEST)
    ):
        return True
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What is asked of a GPTModel is asked of a HybridModel too, where Megatron calls the former deprecated."""
    release = Version(release_of(Path(metafunc.config.getoption("--megatron"))))
    if "build" in metafunc.fixturenames and release >= Version("0.19"):
        metafunc.parametrize("build", ["gpt", "hybrid"], indirect=True)


@pytest.fixture(scope="session")
def release(request: pytest.FixtureRequest) -> Version:
    """The release under test."""
    return Version(release_of(Path(request.config.getoption("--megatron"))))


@pytest.fixture(scope="session")
def with_bias(release: Version) -> bool:
    """Whether this release's router has a `bias` parameter when add_bias_linear is on (0.12 to 0.14 refuse it)."""
    return release >= Version("0.15")


@pytest.fixture
def resume_record(request: pytest.FixtureRequest, release: Version) -> Callable[[str, str, str, str], None]:
    """`resume_record(optimizer, sharding, direction, outcome)`: one cell of the table in docs/resume.md.

    optimizer: Megatron's class name, with its flag where one class has several rows. sharding: Megatron's name of the
    format. direction: "on->on", "off->on", "on->off" (before -> after the resume). outcome: "works", "refused" (by the
    plugin), "upstream refuses" or "rounds" (to bf16). Call it after the assertion that the outcome rests on;
    scripts/docs_resume.py reads
    results/resume/RELEASE.jsonl, where the last record of a cell counts.
    """
    path = request.config.rootpath / "results" / "resume" / f"{release}.jsonl"

    def record(optimizer: str, sharding: str, direction: str, outcome: str) -> None:
        assert direction in {"on->on", "off->on", "on->off"}, direction
        assert outcome in {"works", "refused", "upstream refuses", "rounds"}, outcome
        path.parent.mkdir(parents=True, exist_ok=True)
        cell = {"optimizer": optimizer, "sharding": sharding, "direction": direction, "outcome": outcome}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**cell, "test": request.node.nodeid}) + "\n")

    return record


@pytest.fixture
def build(request: pytest.FixtureRequest) -> Iterator[Callable[..., lab.Lab]]:
    """`build(**recipe)`: a tiny mixture of experts, wrapped, with DDP and an optimizer, ready to train."""
    model = getattr(request, "param", "gpt")
    with ExitStack() as stack:

        def make(**fields: Any) -> lab.Lab:
            stack.close()
            recipe = lab.Recipe(**{"model": model, **fields})
            stack.enter_context(lab.parallel(recipe))
            return lab.build(recipe)

        yield make


@pytest.fixture
def expert_layers(request: pytest.FixtureRequest) -> tuple[int, int]:
    """Megatron's numbers of the two layers that have experts in what `build` builds: attention has some of its own."""
    # Before 0.19 there is one kind of model, and the test has no parameters.
    parameters = request.node.callspec.params.values() if hasattr(request.node, "callspec") else ()
    return (2, 4) if "hybrid" in parameters else (1, 2)


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
