"""What an installation brings, as a wheel and in place: start-up files, hooks, and a protected training."""

from __future__ import annotations

import email
import json
import re
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from installing import ROOT, STARTUP_FILES, Environment, build_wheel, clean_environment, pythons

sys.path.insert(0, str(ROOT / "scripts"))

from bootstrap import NEWEST, ensure_release

PROGRAMS = Path(__file__).parent / "programs"
HOOKS = "megatron_fp32_router.hooks"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the plugin installed by pip, either way, and nothing fetched."""
    made = Environment.make(tmp_path_factory.mktemp(request.param) / "env")
    what = ["--editable", str(ROOT)] if request.param == "editable" else [str(wheel)]
    command = [sys.executable, "-m", "pip", "--python", str(made.python), "install", "--quiet"]
    command += ["--no-deps", "--no-index", "--no-build-isolation", *what]
    # The build back-end of an installation in place runs in the new environment, where it is not installed.
    done = subprocess.run(
        command, env=clean_environment(*made.borrowed_paths()), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    made.borrow()
    return made


def test_the_wheel_holds_all_that_an_installation_needs_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    at_the_root = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert at_the_root == {"megatron_fp32_router", *STARTUP_FILES}
    assert "megatron_fp32_router/py.typed" in names
    assert "megatron_fp32_router/patching/fingerprints.json" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_readme_that_an_index_shows_has_all_of_the_text_and_no_link_that_leads_nowhere(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_string(archive.read(name).decode())
    shown = metadata.get_payload()
    assert metadata["Description-Content-Type"] == "text/markdown"
    links = re.findall(r"\]\(([^)\s]+)", shown)
    assert [link for link in links if not link.startswith("https://")] == []
    assert "`docs/limits.md`" in shown
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^#+ .*", shown, re.MULTILINE) == re.findall(r"^#+ .*", readme, re.MULTILINE)
    # Nothing but links is changed: a line without one is there as it is.
    assert {line for line in readme.splitlines() if "](" not in line} <= set(shown.splitlines())


def test_the_startup_files_lie_at_the_root_of_site_packages(installed: Environment) -> None:
    for name in STARTUP_FILES:
        assert (installed.site / name).read_bytes() == (ROOT / name).read_bytes()


def test_the_hooks_and_the_command_are_registered(installed: Environment) -> None:
    (found,) = installed.site.glob("megatron_fp32_router-*.dist-info/entry_points.txt")
    entry_points = ConfigParser(delimiters="=")
    entry_points.optionxform = str  # type: ignore[assignment,method-assign]
    entry_points.read_string(found.read_text(encoding="utf-8"))
    assert entry_points["console_scripts"]["megatron-fp32-router"] == "_megatron_fp32_router_startup:command"
    program = "import json; from megatron_fp32_router.patching.hooks import MODULES; print(json.dumps(sorted(MODULES)))"
    done = installed.run(program)
    assert (sorted(entry_points[HOOKS]), done.stderr) == (json.loads(done.stdout), "")


def test_the_source_patches_are_there(installed: Environment) -> None:
    program = "from megatron_fp32_router.source_patches import lines; print([len(line.patches) for line in lines()])"
    here = [len(series.read_text().split()) for series in sorted((ROOT / "patches").glob("*.series"))]
    done = installed.run(program)
    assert (done.stdout, done.stderr) == (f"{here}\n", "")


def test_the_variable_works_after_the_installation(installed: Environment, tmp_path: Path) -> None:
    (tmp_path / "megatron").mkdir()
    program = """
import sys
before = "megatron_fp32_router" in sys.modules
import megatron
print(before, "megatron_fp32_router" in sys.modules, "torch" in sys.modules)
"""
    done = installed.run(program, tmp_path, MEGATRON_FP32_ROUTER="1")
    assert (done.stdout, done.stderr) == ("False True False\n", "")


@pytest.mark.parametrize("version", pythons())
def test_the_wheel_installs_and_works_on(version: str, wheel: Path, tmp_path: Path) -> None:
    """On every Python found here (scripts/test says which); wrapt goes without its C part."""
    made = Environment.make(tmp_path / "env", base=pythons()[version])
    made.install(wheel)
    made.borrow_packages("wrapt", "packaging")
    (tmp_path / "megatron").mkdir()
    program = """
import megatron, megatron_fp32_router as plugin
print({patch.state for patch in plugin.status()}, bool(plugin.__version__))
"""
    done = made.run(program, tmp_path, MEGATRON_FP32_ROUTER="1")
    assert (done.stdout, done.stderr) == ("{'armed'} True\n", "")


def test_a_training_that_does_not_mention_the_plugin_is_protected_on_both_ranks(wheel: Path, tmp_path: Path) -> None:
    made = Environment.make(tmp_path / "env")
    made.install(wheel)
    made.borrow()
    command = [made.python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [PROGRAMS / "train.py"]
    done = subprocess.run(
        command,
        # pretence/ makes the CPU pass for CUDA; it does not import the plugin.
        env=clean_environment(
            ensure_release(NEWEST),
            PROGRAMS / "pretence",
            LAB=str(ROOT / "megatron_fp32_router" / "lab"),
            MEGATRON_FP32_ROUTER="1",
            CUDA_VISIBLE_DEVICES="",
            OMP_NUM_THREADS="1",
        ),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ours = [line for line in done.stderr.splitlines() if "megatron_fp32_router" in line]
    # What rank 0 sees of its own model, and that all ranks agree.
    assert ["2 routers: " in line for line in ours] == [True, False], done.stderr
    assert "all 2 ranks on 1 host agree: 4 routers" in ours[1]
    printed = sorted(line for line in done.stdout.splitlines() if line.startswith("rank "))
    ranks = [json.loads(line.partition(": ")[2]) for line in printed]
    assert len(ranks) == 2
    for rank in ranks:
        assert {"torch.bfloat16", "torch.float16"}.isdisjoint(rank["dtypes"].values())
        assert rank["dtypes"]["weight"] == rank["dtypes"]["expert_bias"] == "torch.float32"
        assert rank["bias"] == rank["exact"]
    assert ranks[0]["bias"] == ranks[1]["bias"]
    assert any(value != 0.75 for value in ranks[0]["bias"])


def test_the_training_program_does_not_mention_the_plugin() -> None:
    assert "fp32_router" not in (PROGRAMS / "train.py").read_text(encoding="utf-8").lower()
