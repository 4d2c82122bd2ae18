"""docs/troubleshooting.md has every error of ours, with the messages that are really raised and what to do."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from messages import REFUSALS, errors

import megatron_fp32_router
from megatron_fp32_router.errors import Fp32RouterError

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL))


def _derived(cls: type[Fp32RouterError]) -> Iterator[type[Fp32RouterError]]:
    yield cls
    for below in cls.__subclasses__():
        yield from _derived(below)


def test_every_error_class_of_the_package_is_found_in_its_source() -> None:
    for module in pkgutil.walk_packages(megatron_fp32_router.__path__, "megatron_fp32_router."):
        # The others need Megatron, or run something; an error that they define is in the source all the same.
        if module.name.rpartition(".")[2] in ("errors", "recipe", "launch", "report", "find", "contracts", "predict"):
            importlib.import_module(module.name)
    seen = {cls.__name__ for cls in _derived(Fp32RouterError) if cls.__module__.startswith("megatron_fp32_router")}
    assert {"SettingsError", "LabError", "NoMegatronError", "UnreadableRunError"} <= seen <= errors().keys()


@pytest.mark.parametrize("name", errors())
def test_every_error_class_has_a_section_with_messages_and_what_to_do(name: str) -> None:
    assert name in SECTIONS, f"docs/troubleshooting.md lacks a section for {name}"
    assert f"<!-- table: messages-{name}, by scripts/docs -->" in SECTIONS[name]
    assert errors()[name].messages
    (advice,) = re.findall(r"\*\*What to do\.\*\* (.*)", SECTIONS[name], re.DOTALL)
    assert len(advice.split()) >= 10


def test_no_section_is_about_an_error_that_is_gone() -> None:
    assert SECTIONS.keys() == errors().keys()


def test_every_combination_that_is_refused_is_listed() -> None:
    calls = 0
    for path in Path(megatron_fp32_router.__path__[0], "optimizers").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        calls += len(re.findall(rf"^ +(?:return )?(?:{'|'.join(REFUSALS)})\(\n", text, re.MULTILINE))
    # torch FSDP2, Megatron-FSDP and its main copies; each has a row that names what was found.
    listed = [text for text in errors()["CombinationRefusedError"].messages if "beside … ones: " in text]
    assert len(listed) == calls == 3


def _setting(**variables: str) -> Callable[[], Any]:
    from megatron_fp32_router.settings import from_environment

    return lambda: from_environment({f"MEGATRON_FP32_ROUTER_{name}": value for name, value in variables.items()})


def _audit() -> None:
    from megatron_fp32_router.audit import formats

    formats.open_checkpoint(Path("no/such/checkpoint"))


@pytest.mark.parametrize(
    "fails",
    [
        _setting(PROTECT="some"),
        _setting(AGREE_TIMEOUT="soon"),
        _setting(MONITOR="-1"),
        _audit,
    ],
    ids=["a word", "seconds", "steps", "checkpoint"],
)
def test_a_message_that_is_raised_is_found_on_the_page(fails: Callable[[], Any]) -> None:
    with pytest.raises(Fp32RouterError) as raised:
        fails()
    patterns = [".+".join(map(re.escape, text.split("…"))) for text in errors()[type(raised.value).__name__].messages]
    assert any(re.fullmatch(pattern, str(raised.value)) for pattern in patterns), str(raised.value)
