"""What a terminal shows: help with an example for every command, and one screen where a variable is wrong."""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import sys

import pytest
from bootstrap import NEWEST, ensure_release
from installing import ROOT, clean_environment

from megatron_fp32_router import cli
from megatron_fp32_router.terminal import painted

#: The size of a new terminal.
LINES = 24


def _commands() -> dict[str, argparse.ArgumentParser]:
    parser = cli._parser(with_demo=True, with_serving=True)
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(commands.choices)


@pytest.mark.parametrize("name", cli._DESCRIPTIONS)
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
    # One traceback, without the package's own functions.
    assert done.stderr.count("Traceback") == 1
    assert "settings.py" not in done.stderr
    assert "importlib" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["audit", "/nowhere"],
        ["report", "/nowhere"],
        ["check", "--megatron", "/nowhere"],
        ["patch", "--megatron", "/nowhere"],
        ["demo", "--megatron", "/nowhere"],
        ["predict", "--release", "9.9", "--experts", "8", "--ranks", "1"],
        ["parity", "/nowhere", "--for", "vllm==0.33.0", "--config", "/nowhere"],
        ["run", "/nowhere"],
        ["doctor", "--shape", "nonsense"],
    ],
    ids=lambda arguments: " ".join(arguments[:1]),
)
def test_whatever_goes_wrong_is_said_with_one_prefix_and_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(arguments)
    except SystemExit as ended:  # argparse's own
        code = int(str(ended.code))
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert captured.err.splitlines()[-1].startswith(f"megatron-fp32-router {arguments[0]}: ")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("terminal", "variables", "coloured"),
    [(True, {}, True), (True, {"NO_COLOR": "1"}, False), (True, {"TERM": "dumb"}, False), (False, {}, False)],
    ids=["terminal", "NO_COLOR", "dumb terminal", "file"],
)
def test_verdicts_have_a_colour_on_a_terminal_and_nowhere_else(
    terminal: bool, variables: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NO_COLOR": "", "TERM": "xterm", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", _Terminal() if terminal else io.StringIO())
    assert (painted("fits", "good") == "\x1b[32mfits\x1b[0m") == coloured
    assert (painted("fits", "good") == "fits") != coloured


SCRIPTS = [path.name for path in sorted((ROOT / "scripts").iterdir()) if path.is_file() and not path.suffix]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_on_an_old_python_names_itself(name: str) -> None:
    # Python 3.8 can parse the file, so its first lines can refuse.
    ast.parse((ROOT / "scripts" / name).read_text(encoding="utf-8"), feature_version=(3, 8))
    program = (
        "import runpy, sys; sys.version_info = (3, 9, 18, 'final', 0); sys.path.insert(0, 'scripts');"
        f"sys.argv = ['scripts/{name}', '--some', 'thing']; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"scripts/{name} needs Python 3.10 or newer; this is ")
    assert done.stderr.endswith(f"Run it with a newer one, for example: python3.12 scripts/{name} --some thing\n")
