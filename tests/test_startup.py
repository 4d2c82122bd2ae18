"""MEGATRON_FP32_ROUTER=1: nothing happens before Megatron is imported, and nothing trains unprotected after.

Real interpreters in real environments, into which the wheel, built here, is unpacked. Their Megatron is an
empty package, so that it is seen that arming by itself imports no torch; test_installed.py has a real one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import packaging.version
import pytest
from installing import ROOT, Environment, build_wheel

#: Prints which of the heavy modules are there.
LOADED = """
import sys
names = ("_megatron_fp32_router_startup", "megatron_fp32_router", "wrapt", "torch", "megatron")
print([name for name in names if name in sys.modules])
"""
GATES = """
import sys
print(sum(type(finder).__module__ == "_megatron_fp32_router_startup" for finder in sys.meta_path))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("megatron")
    (tree / "megatron" / "core").mkdir(parents=True)
    (tree / "megatron" / "core" / "__init__.py").write_text("")
    return tree


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environment:
    """The plugin is installed, and so is what it needs."""
    made = Environment.make(tmp_path_factory.mktemp("whole") / "env")
    made.install(wheel)
    made.borrow()
    return made


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environment:
    """The plugin is installed, but not wrapt."""
    made = Environment.make(tmp_path_factory.mktemp("bare") / "env")
    made.install(wheel)
    return made


@pytest.mark.parametrize("variables", [{}, {"MEGATRON_FP32_ROUTER": ""}, {"MEGATRON_FP32_ROUTER": "0"}])
def test_without_the_variable_not_even_the_startup_module_is_imported(
    environment: Environment, megatron: Path, variables: dict[str, str]
) -> None:
    done = environment.run("import megatron.core" + LOADED, megatron, **variables)
    assert (done.stdout, done.stderr) == ("['megatron']\n", "")


def test_with_the_variable_nothing_heavy_is_imported_before_megatron(environment: Environment) -> None:
    done = environment.run(LOADED, MEGATRON_FP32_ROUTER="1")
    assert (done.stdout, done.stderr) == ("['_megatron_fp32_router_startup']\n", "")


def test_importing_megatron_arms_the_plugin_without_torch(environment: Environment, megatron: Path) -> None:
    done = environment.run("import megatron.core" + LOADED, megatron, MEGATRON_FP32_ROUTER="1")
    expected = ["_megatron_fp32_router_startup", "megatron_fp32_router", "wrapt", "megatron"]
    assert (done.stdout, done.stderr) == (f"{expected}\n", "")


def test_hooks_are_set_before_megatron_is_there(environment: Environment, megatron: Path) -> None:
    program = """
import megatron
import megatron_fp32_router
print({patch.state for patch in megatron_fp32_router.status()})
"""
    done = environment.run(program, megatron, MEGATRON_FP32_ROUTER="1")
    assert (done.stdout, done.stderr) == ("{'armed'}\n", "")


@pytest.mark.parametrize("name", ["megatron_energon", "megatronics"])
def test_a_name_that_only_begins_like_megatron_does_not_arm(
    environment: Environment, tmp_path: Path, name: str
) -> None:
    (tmp_path / f"{name}.py").write_text("")
    done = environment.run(f"import {name}" + LOADED, tmp_path, MEGATRON_FP32_ROUTER="1")
    assert (done.stdout, done.stderr) == ("['_megatron_fp32_router_startup']\n", "")


def test_without_wrapt_megatron_cannot_be_imported_and_the_error_says_how_to_go_on(
    bare: Environment, megatron: Path
) -> None:
    done = bare.run("import megatron.core", megatron, MEGATRON_FP32_ROUTER="1")
    assert done.returncode == 1
    assert "RuntimeError: MEGATRON_FP32_ROUTER=1 asks for megatron_fp32_router" in done.stderr
    assert "No module named 'wrapt'" in done.stderr
    assert f"{bare.python} -m pip install 'wrapt>=1.17,<3'" in done.stderr
    assert "unset MEGATRON_FP32_ROUTER to train without the plugin" in done.stderr


def test_without_wrapt_a_program_without_megatron_runs(bare: Environment) -> None:
    done = bare.run("print('runs')", MEGATRON_FP32_ROUTER="1")
    assert (done.stdout, done.stderr) == ("runs\n", "")


def test_a_program_that_swallows_import_errors_is_stopped_every_time(bare: Environment, megatron: Path) -> None:
    program = """
for name in ("megatron", "megatron.core", "megatron"):
    try:
        __import__(name)
    except ImportError:
        print("went on without the plugin")
    except RuntimeError as error:
        print(type(error.__cause__).__name__)
"""
    done = bare.run(program, megatron, MEGATRON_FP32_ROUTER="1")
    assert done.stdout.splitlines() == ["ModuleNotFoundError"] * 3


def test_a_later_pth_file_may_bring_wrapt(
    wheel: Path, megatron: Path, tmp_path: Path, environment: Environment
) -> None:
    # In `environment` it does, since 'zz_' sorts after our file. Here that order is made sure of.
    names = sorted(path.name for path in environment.site.glob("*.pth"))
    assert names.index("megatron_fp32_router.pth") < names.index("zz_borrowed.pth")
    done = environment.run("import megatron; import wrapt; print('armed')", megatron, MEGATRON_FP32_ROUTER="1")
    assert (done.stdout, done.stderr) == ("armed\n", "")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MEGATRON_FP32_ROUTER", "ture"),
        ("MEGATRON_FP32_ROUTER", "true"),
        ("MEGATRON_FP32_ROUTER_PROTECT", "weights"),
        ("MEGATRON_FP32_ROUTER_ON_MISMATCH", "shrug"),
    ],
)
def test_a_bad_value_is_an_error_at_the_import_of_megatron_that_names_it(
    environment: Environment, megatron: Path, variable: str, value: str
) -> None:
    variables = {"MEGATRON_FP32_ROUTER": "1"} | {variable: value}
    done = environment.run("import megatron.core", megatron, **variables)
    assert done.returncode == 1
    last = done.stderr.rsplit("RuntimeError: ", 1)[1]
    assert variable in last
    assert repr(value) in last
    assert "correct what the error names" in last


def test_a_package_that_is_gone_is_an_error_at_the_import_of_megatron(
    environment: Environment, megatron: Path, tmp_path: Path
) -> None:
    left_over = Environment.make(tmp_path / "env")
    for name in ("_megatron_fp32_router_startup.py", "megatron_fp32_router.pth"):
        (left_over.site / name).write_text((ROOT / name).read_text())
    done = left_over.run("import megatron.core", megatron, MEGATRON_FP32_ROUTER="1")
    assert done.returncode == 1
    assert "No module named 'megatron_fp32_router'" in done.stderr
    assert "install it again" in done.stderr


def test_the_startup_line_leaves_one_gate_however_often_it_runs(environment: Environment) -> None:
    program = "import _megatron_fp32_router_startup as startup; startup.init(); startup.init()"
    done = environment.run(program + GATES, MEGATRON_FP32_ROUTER="1")
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_init_without_the_variable_leaves_no_gate(environment: Environment) -> None:
    # This is how a .start file calls it: unconditionally.
    done = environment.run("import _megatron_fp32_router_startup as startup; startup.init()" + GATES)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_a_program_that_turns_the_variable_off_in_time_is_let_through(bare: Environment, megatron: Path) -> None:
    program = "import os; os.environ['MEGATRON_FP32_ROUTER'] = '0'; import megatron.core; print('through')"
    done = bare.run(program, megatron, MEGATRON_FP32_ROUTER="1")
    assert (done.stdout, done.stderr) == ("through\n", "")


def test_an_explicit_import_before_megatron_gets_along_with_the_gate(environment: Environment, megatron: Path) -> None:
    program = "import megatron_fp32_router; import megatron.core; import megatron_fp32_router; print('both')"
    done = environment.run(program, megatron, MEGATRON_FP32_ROUTER="1")
    assert (done.stdout, done.stderr) == ("both\n", "")


def test_arming_in_one_thread_does_not_deadlock_with_an_import_in_another(
    environment: Environment, megatron: Path, tmp_path: Path
) -> None:
    # When Megatron is imported, the other thread is in the middle of importing what the package needs. The
    # import system's global lock is held around finders, and the other thread cannot finish without it.
    # Here that is packaging.version, which gets a slow beginning.
    real = Path(packaging.version.__file__)
    (tmp_path / "packaging").mkdir()
    (tmp_path / "packaging" / "__init__.py").write_text(f"__path__.append({str(real.parent)!r})\n")
    (tmp_path / "packaging" / "version.py").write_text(
        f"import time; time.sleep(1); import a_part; exec(open({str(real)!r}).read())\n"
    )
    (tmp_path / "a_part.py").write_text("")
    program = """
import threading, time
thread = threading.Thread(target=__import__, args=("packaging.version",), daemon=True)
thread.start()
time.sleep(0.3)
import megatron.core
thread.join()
import megatron_fp32_router
print("armed")
"""
    done = environment.run(program, tmp_path, megatron, MEGATRON_FP32_ROUTER="1")
    assert (done.stdout, done.stderr) == ("armed\n", "")


def test_the_gate_starts_the_search_afresh_for_finders_that_arming_adds(
    megatron: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    import _megatron_fp32_router_startup as startup

    class Added:
        asked: list[str] = []  # noqa: RUF012 - lives as long as this test

        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            self.asked.append(name)

    def arm() -> None:
        sys.meta_path.insert(0, Added())
        gate.is_open = True

    gate = startup.Gate()
    monkeypatch.setattr(gate, "open", arm)
    monkeypatch.setenv("MEGATRON_FP32_ROUTER", "1")
    monkeypatch.setattr(sys, "meta_path", [gate, *sys.meta_path])
    gate.find_spec("megatron")
    assert Added.asked == ["megatron"]


NEAR_MISSES = {
    "MEGATRON_FP32ROUTER": "1",
    "MEGATRON_FP32_ROUTERS": "1",
    "MEGATRON_FP32_ROUTE": "true",
    "MEGATRON_ROUTER_FP32": "1",
    "MEGATRON_CORE_FP32_ROUTER": "1",
    "megatron_fp32_router": "1",
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_of_the_variable_is_said_once_when_megatron_is_imported(
    name: str, environment: Environment, megatron: Path
) -> None:
    program = "import megatron; import megatron.core; import importlib; importlib.reload(megatron.core)"
    done = environment.run(program + LOADED, megatron, **{name: NEAR_MISSES[name]})
    assert done.stdout == "['_megatron_fp32_router_startup', 'megatron']\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"megatron_fp32_router: {name}={NEAR_MISSES[name]} turns nothing on")
    assert "Routers train unprotected" in line
    assert "Set MEGATRON_FP32_ROUTER=1" in line


@pytest.mark.parametrize(
    ("program", "variables"),
    [
        ("print('no Megatron')", {}),
        ("import megatron_fp32_router; print('asked for otherwise'); import megatron", {}),
        ("import megatron; print('rank 1')", {"RANK": "1"}),
        ("import megatron; print('off')", {"MEGATRON_FP32_ROUTER": "0"}),
        ("import megatron; print('on')", {"MEGATRON_FP32_ROUTER": "1"}),
        ("import megatron; print('not switched on')", {"MEGATRON_ROUTER_FP32": "0"}),
        ("import os; del os.environ['MEGATRON_ROUTER_FP32']; import megatron; print('taken back')", {}),
    ],
)
def test_a_near_miss_is_not_said(
    program: str, variables: dict[str, str], environment: Environment, megatron: Path
) -> None:
    done = environment.run(program, megatron, **{"MEGATRON_ROUTER_FP32": "1"} | variables)
    assert done.stdout.count("\n") == 1, done.stderr
    # The plugin itself, where it is on, says that the name is none of its own.
    assert "turns nothing on" not in done.stderr


def test_a_near_miss_is_said_where_megatron_was_imported_even_earlier(
    megatron: Path, tmp_path: Path, wheel: Path
) -> None:
    made = Environment.make(tmp_path / "env")
    made.install(wheel)
    (made.site / "a_first.pth").write_text("import megatron\n")
    done = made.run("print('runs')", megatron, MEGATRON_FP32ROUTER="1")
    assert (done.stdout, done.stderr.count("turns nothing on")) == ("runs\n", 1)


def test_children_and_workers_do_not_repeat_a_near_miss(
    environment: Environment, megatron: Path, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text("""
import multiprocessing
import megatron

def child():
    import megatron.core

if __name__ == "__main__":
    for method in ("fork", "spawn", "forkserver"):
        process = multiprocessing.get_context(method).Process(target=child)
        process.start()
        process.join()
        print(process.exitcode)
""")
    run = f"import runpy, sys; sys.argv = [{str(program)!r}]; runpy.run_path({str(program)!r}, run_name='__main__')"
    done = environment.run(run, megatron, MEGATRON_FP32ROUTER="1")
    assert done.stdout.split() == ["0"] * 3, done.stderr
    assert done.stderr.count("turns nothing on") == 1, done.stderr


@pytest.mark.parametrize(
    "variables",
    [{"MEGATRON_FP32_ROUTER_MONITOR": "10"}, {"OTHER_FP32": "1"}, {"MEGATRON_ROUTE": "1"}, {"FP32_ROUTER_BIAS": "1"}],
)
def test_other_names_are_no_near_miss(environment: Environment, megatron: Path, variables: dict[str, str]) -> None:
    done = environment.run("import megatron; print('through')", megatron, **variables)
    assert (done.stdout, done.stderr) == ("through\n", "")


def test_options_without_the_switch_load_nothing(environment: Environment) -> None:
    done = environment.run(LOADED, MEGATRON_FP32_ROUTER_MONITOR="10", MEGATRON_FP32_ROUTER_LOG="debug")
    assert (done.stdout, done.stderr) == ("[]\n", "")
