"""`doctor`: what it says about an interpreter, its start-up files, variables, libraries, and the Megatron in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from bootstrap import ensure_release
from packaging.version import Version

from megatron_fp32_router.cli import main
from megatron_fp32_router.compat import environment, find
from megatron_fp32_router.patching.fingerprints import known
from megatron_fp32_router.patching.records import PATCHES

ROOT = Path(__file__).resolve().parent.parent
ROUTER = "megatron/core/transformer/moe/router.py"

PROGRAM = """
import sys
from megatron_fp32_router.cli import main
code = main(["doctor", "--json"])
print(code, sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "megatron"}), file=sys.stderr)
"""


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MEGATRON_FP32_ROUTER")]:
        monkeypatch.delenv(name)


def at_least(release: str, other: str) -> bool:
    return Version(release) >= Version(other)


def doctor(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, dict[str, Any]]:
    code = main(["doctor", "--json", *map(str, arguments)])
    return code, json.loads(capsys.readouterr().out)


def said(report: dict[str, Any], level: str, about: str) -> list[str]:
    return [f["text"] for f in report["findings"] if (f["level"], f["about"]) == (level, about)]


def test_in_a_healthy_environment_nothing_stands_in_the_way_and_nothing_heavy_is_imported(tmp_path: Path) -> None:
    first, second = ensure_release("0.19.2"), ensure_release("0.16.1")
    for package in ("verl", "mindspeed"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "megatron" / "bridge").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={"PATH": "", "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, first, second, ROOT)))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == "0 []\n"
    report = json.loads(done.stdout)
    assert report["verdict"] == "good"
    assert report["megatron"] == {"version": "0.19.2", "paths": [str(first), str(second)]}
    assert any(str(second) in text for text in said(report, "note", "Megatron"))
    states = {patch["id"]: patch["state"] for patch in report["patches"]}
    assert states["gating"] == "applied"
    assert states["router-init"] == "native"
    others = " ".join(said(report, "note", "other patcher"))
    for name, what in (("verl", "TopKRouter.__init__"), ("MindSpeed", "replaces"), ("Megatron-Bridge", "early")):
        assert f"{name} ({tmp_path}" in others
        assert what in others
    assert {library["name"] for library in report["libraries"]} >= {"wrapt", "torch", "TransformerEngine"}


def test_a_patch_whose_function_is_gone_and_one_that_upstream_made_needless_say_so(capsys: Any) -> None:
    _, report = doctor(capsys, "--megatron", ensure_release("0.19.2"))
    details = {patch["id"]: (patch["state"], patch["detail"]) for patch in report["patches"]}
    assert details["refuse-custom-fsdp"] == ("n/a", "has no such function")
    said = "needs no such patch: Router.__init__ no longer casts (from 0.13 reset_parameters does)"
    assert details["router-init"] == ("native", said)
    for patch in PATCHES:
        # The known releases say whether the function is there.
        digests = known().targets.get(f"{patch.module}:{patch.path}", ())
        if patch.until is not None and digests:
            after = [n for release, n in zip(known().releases, digests, strict=True) if at_least(release, patch.until)]
            assert set(after) <= {None} if patch.gone else None not in after, patch.id


def test_without_a_megatron_it_could_not_tell(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "installed", list)
    code, report = doctor(capsys)
    assert (code, report["verdict"]) == (2, "unknown")
    assert main(["doctor"]) == 2
    assert "No Megatron could be looked at" in capsys.readouterr().out


def test_a_misspelt_variable_is_a_problem_and_the_right_name_is_given(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGATRON_FP32_ROUTER_PROTEKT", "all")
    code, report = doctor(capsys, "--megatron", ensure_release("0.19.2"))
    assert code == 1
    assert "did you mean MEGATRON_FP32_ROUTER_PROTECT?" in said(report, "problem", "variable")[0]


@pytest.mark.parametrize("name", ["MEGATRON_FP32ROUTER", "MEGATRON_FP32_ROUTERS", "MEGATRON_ROUTER_FP32"])
def test_a_near_miss_of_the_switch_is_a_problem(name: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    code, report = doctor(capsys, "--megatron", ensure_release("0.19.2"))
    assert code == 1
    assert said(report, "problem", "variable") == [
        f"{name} is not a variable of this plugin and has no effect; did you mean MEGATRON_FP32_ROUTER?"
    ]


def test_a_bad_value_is_one_line_and_exit_code_2_where_even_the_package_cannot_start() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import _megatron_fp32_router_startup as s, sys; sys.exit(s.command())", "doctor"],
        env={**os.environ, "MEGATRON_FP32_ROUTER_PROTECT": "weights", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "MEGATRON_FP32_ROUTER_PROTECT has the value 'weights'; accepted are 'all', 'buffers'" in done.stderr


@pytest.mark.parametrize("arguments", [("-m", "megatron_fp32_router", "check"), ("-m", "megatron_fp32_router", "run")])
def test_python_m_says_a_bad_value_in_one_line_too_and_runs_nothing(arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print('trained')\n", encoding="utf-8")
    (tmp_path / "mine.py").write_text("import megatron_fp32_router\nprint('trained')\n", encoding="utf-8")
    environment = {**os.environ, "MEGATRON_FP32_ROUTER_MONITOR": "abc", "PYTHONPATH": str(ROOT)}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        whole = [sys.executable, "-W", "ignore", *command]
        return subprocess.run(whole, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = run(*arguments, "train.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "MEGATRON_FP32_ROUTER_MONITOR has the value 'abc'" in done.stderr
    # Every other program gets the exception, also one that is a module itself.
    for command in (("-m", "mine"), ("mine.py", "-m", "megatron_fp32_router"), ("-c", "import mine")):
        done = run(*command)
        assert (done.returncode, done.stdout) == (1, "")
        assert "SettingsError" in done.stderr


@pytest.mark.parametrize("switch", ["1", None])
def test_a_startup_file_that_python_does_not_read_is_a_problem_only_if_the_job_needs_it(
    switch: str | None, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # As with `pip install --target`, and with a checkout on PYTHONPATH.
    target, site = tmp_path / "target", tmp_path / "site"
    for folder in (target, site):
        folder.mkdir()
    shutil.copy(ROOT / environment.STARTUP_FILE, target)
    monkeypatch.setattr(environment, "site_folders", lambda: [site])
    monkeypatch.setattr(sys, "path", [str(target), *(entry for entry in sys.path if entry != str(ROOT))])
    if switch:
        monkeypatch.setenv("MEGATRON_FP32_ROUTER", switch)
    code, report = doctor(capsys, "--megatron", ensure_release("0.19.2"))
    (text,) = said(report, "problem" if switch else "note", "start-up file")
    assert f"{target / environment.STARTUP_FILE} is not read" in text
    assert "-m megatron_fp32_router run" in text
    assert code == (1 if switch else 0)
    shutil.copy(ROOT / environment.STARTUP_FILE, site)
    code, report = doctor(capsys, "--megatron", ensure_release("0.19.2"))
    assert said(report, "ok", "start-up file") == [str(site / environment.STARTUP_FILE)]
    assert code == 0


def test_python_s_reads_no_startup_files() -> None:
    program = "import sys; from megatron_fp32_router.compat import environment; print(environment.startup())"
    paths = [str(ROOT), *(entry for entry in sys.path if entry.endswith("site-packages"))]
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "(False, 'python -S reads no start-up files')\n", done.stderr


def test_the_kill_switch_is_a_problem_that_is_named(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_FP32_ROUTER", "0")
    code, report = doctor(capsys, "--megatron", ensure_release("0.19.2"))
    assert code == 1
    assert "turns the plugin off" in said(report, "problem", "switch")[0]
    assert {patch["state"] for patch in report["patches"]} == {"off"}


def test_a_drifted_megatron_is_a_problem_and_the_patches_say_why(capsys: Any, tmp_path: Path) -> None:
    source = ensure_release("0.19.2")
    for file in (source / "megatron" / "core").rglob("*.py"):
        copied = tmp_path / file.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copied)
    text = (tmp_path / ROUTER).read_text(encoding="utf-8")
    (tmp_path / ROUTER).write_text(text.replace("self.ga_steps.zero_()", "self.ga_steps.fill_(1)"), encoding="utf-8")
    code, report = doctor(capsys, "--megatron", tmp_path)
    assert code == 1
    (patch,) = [patch for patch in report["patches"] if patch["state"] == "drifted"]
    assert patch["id"] == "counter-reset"
    assert "TopKRouter.reset_global_aux_loss_tracker has changed" in patch["detail"]
    assert main(["doctor", "--megatron", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "1 problem, marked with !!" in output
    assert len(output.splitlines()) < 30  # one screen, and on it only the patch that does not fit
    assert ("counter-reset" in output, "router-casts" in output) == (True, False)
    main(["doctor", "--verbose", "--megatron", str(tmp_path)])
    everything = capsys.readouterr().out
    assert all(patch["id"] in everything for patch in report["patches"])


def test_an_accepted_file_that_cannot_be_read_is_the_problem_and_the_patches_are_shown(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGATRON_FP32_ROUTER_ACCEPTED", "none.json")
    code, report = doctor(capsys, "--megatron", ensure_release("0.19.2"))
    assert code == 1
    (text,) = said(report, "problem", "accepted file")
    assert text.startswith("the accepted file none.json cannot be read: No such file or directory")
    assert said(report, "unknown", "Megatron") == []
    assert {patch["state"] for patch in report["patches"]} == {"applied", "native", "n/a"}
    assert main(["doctor", "--megatron", str(ensure_release("0.19.2"))]) == 1
    assert "could be looked at" not in capsys.readouterr().out


def test_a_value_that_is_not_accepted_is_a_problem_and_the_patches_are_shown(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGATRON_FP32_ROUTER_MONITOR", "abc")
    code, report = doctor(capsys, "--megatron", ensure_release("0.19.2"))
    assert code == 1
    assert "MEGATRON_FP32_ROUTER_MONITOR has the value 'abc'" in said(report, "problem", "variable")[0]
    assert report["patches"]


def test_without_torch_something_stands_in_the_way(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = environment.libraries()
    without = [*[found for found in real if found.name != "torch"], environment.Library("torch", None, None)]
    monkeypatch.setattr(environment, "libraries", lambda: without)
    code, report = doctor(capsys, "--megatron", ensure_release("0.19.2"))
    assert (code, report["verdict"]) == (1, "problem")
    (text,) = said(report, "problem", "torch")
    assert f"{sys.executable} -m pip install torch" in text
    main(["doctor", "--megatron", str(ensure_release("0.19.2"))])
    assert "Nothing stands in the way" not in capsys.readouterr().out


def test_doctor_fits_a_terminal_as_it_opens_and_verbose_has_the_rest(capsys: Any) -> None:
    main(["doctor", "--megatron", str(ensure_release("0.11.0"))])
    brief = capsys.readouterr().out
    assert sum(-(-len(line) // 80) for line in brief.splitlines()) <= 24
    assert f"{Path(torch.__file__).parent}" not in brief
    # The installed metadata's version. Only torch itself knows what a build for CUDA adds to it.
    assert f"torch {version('torch')}" in brief
    assert re.search(r"would be: \d+ applied, \d+ n/a", brief)
    main(["doctor", "--verbose", "--megatron", str(ensure_release("0.11.0"))])
    assert torch.__file__ in capsys.readouterr().out


def test_wrapt_that_is_too_old_is_a_problem(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = environment.libraries()
    old = [environment.Library("wrapt", "1.16.0", "somewhere"), *[found for found in real if found.name != "wrapt"]]
    monkeypatch.setattr(environment, "libraries", lambda: old)
    code, report = doctor(capsys, "--megatron", ensure_release("0.19.2"))
    assert code == 1
    assert "pip install 'wrapt>=1.17,<3'" in said(report, "problem", "wrapt")[0]
