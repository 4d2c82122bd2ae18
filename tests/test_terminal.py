"""What a terminal shows: help that helps, for every command, and one screen where a variable is wrong."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest
from bootstrap import NEWEST, ensure_release
from installing import ROOT, clean_environment

from megatron_fp32_router import cli

#: A terminal as it opens.
LINES = 24


def _commands() -> dict[str, argparse.ArgumentParser]:
    parser = cli._parser(with_demo=True, with_serving=True)
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(commands.choices)


@pytest.mark.parametrize("name", ["run", "audit", "patch", "report", "check", "doctor", "demo", "predict"])
def test_help_has_a_description_exit_codes_and_an_example_that_is_understood(name: str) -> None:
    command = _commands()[name]
    text = command.format_help()
    description = (command.description or "").split("\n\n")
    assert [len(part.split()) >= 5 for part in description] == [True, True]
    codes, _, example = text.partition("exit codes:\n")[2].partition("\n\nexample:\n")
    assert " 2" in codes
    shown = example.split()
    assert shown[:2] == ["megatron-fp32-router", name]
    cli._parser(with_demo=True, with_serving=True).parse_args(shown[1:])
    assert max(map(len, text.splitlines())) <= 110


def test_no_command_is_without_such_a_test() -> None:
    assert _commands().keys() == cli._DESCRIPTIONS.keys()


@pytest.mark.parametrize(
    ("program", "variables"),
    [
        ("import megatron_fp32_router", {}),
        ("import _megatron_fp32_router_startup as s; s.init(); import megatron.core", {"MEGATRON_FP32_ROUTER": "1"}),
    ],
    ids=["import", "variable"],
)
def test_a_variable_with_a_wrong_value_stops_with_one_screen(program: str, variables: dict[str, str]) -> None:
    environment = clean_environment(ROOT, ensure_release(NEWEST), MEGATRON_FP32_ROUTER_PROTECT="foo", **variables)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    said = done.stderr.splitlines()
    assert len(said) <= LINES
    assert (
        "SettingsError: MEGATRON_FP32_ROUTER_PROTECT has the value 'foo'; accepted are 'all', 'buffers'" in done.stderr
    )
    # Once, and nothing of how it came about in the package.
    assert done.stderr.count("Traceback") == 1
    assert "settings.py" not in done.stderr
