"""Where the package may lie: in a zip, and twice on the path. Real interpreters, real Megatron."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipapp
from pathlib import Path

import pytest
from bootstrap import NEWEST, RELEASES, ensure_release
from installing import ROOT, Environment, build_wheel, clean_environment, pythons

PACKAGE = "megatron_fp32_router"

#: Trains a step, and prints what states the patches are in whose modules are there.
TRAINING = """
import sys
import megatron_fp32_router
from megatron_fp32_router import lab
from megatron_fp32_router.patching.records import PATCHES
lab.prepare(sys.argv[1])
recipe = lab.Recipe(seq_length=16, micro_batches=1)
with lab.parallel(recipe):
    room = lab.build(recipe)
    room.step(lab.text_batches(recipe, seed=1))
    print({str(router.weight.dtype) for _, router in room.routers()})
here = {patch.id for patch in PATCHES if patch.module in sys.modules}
print({record.state for record in megatron_fp32_router.status() if record.id in here})
print(megatron_fp32_router.__file__)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Has what the plugin and the laboratory need, but not the plugin."""
    made = Environment.make(tmp_path_factory.mktemp("places") / "env")
    made.borrow()
    return made


def copy_to(folder: Path) -> Path:
    """A checkout: the package, and the patches beside it."""
    for name in (PACKAGE, "patches"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "_megatron_fp32_router_startup.py", folder)
    return folder


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout as `python -m zipapp` packs it."""
    folder = tmp_path_factory.mktemp("application")
    zipapp.create_archive(copy_to(folder / "tree"), folder / "plugin.pyz", main="megatron_fp32_router.cli:main")
    return folder / "plugin.pyz"


@pytest.fixture(scope="module", params=["wheel", "application"])
def zipped(request: pytest.FixtureRequest, application: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin as one file. A wheel is a zip, too."""
    return application if request.param == "application" else build_wheel(tmp_path_factory.mktemp("wheel"))


def run(environment: Environment, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [environment.python, "-W", "ignore", *arguments],
        cwd=environment.python.parent,
        env=clean_environment(**variables),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_training_from_a_zip_is_protected(environment: Environment, zipped: Path) -> None:
    done = run(environment, "-c", TRAINING, str(ensure_release(NEWEST)), PYTHONPATH=str(zipped))
    assert done.returncode == 0, done.stderr
    dtypes, states, file = done.stdout.splitlines()[-3:]
    assert (dtypes, file) == ("{'torch.float32'}", f"{zipped}/{PACKAGE}/__init__.py")
    assert set(eval(states)) == {"applied", "native"}


def test_the_commands_work_from_a_zip(environment: Environment, zipped: Path, tmp_path: Path) -> None:
    tree = tmp_path / "megatron-core"
    shutil.copytree(ensure_release(NEWEST), tree)

    def command(*arguments: str) -> tuple[int, str, str]:
        done = run(environment, "-m", PACKAGE, *arguments, "--megatron", str(tree), PYTHONPATH=str(zipped))
        return done.returncode, done.stdout, done.stderr

    code, out, err = command("check", "--json")
    assert (code, json.loads(out)["verdict"], err) == (0, "fits", "")
    code, out, err = command("doctor", "--json")
    assert (code, json.loads(out)["plugin"]["path"], err) == (0, f"{zipped}/{PACKAGE}", "")
    before = (tree / "megatron/core/transformer/moe/router.py").read_bytes()
    for options, expected in ((["--check"], 1), ([], 0), (["--check"], 0), (["--reverse"], 0)):
        code, out, err = command("patch", *options)
        assert (code, err) == (expected, ""), out
    assert (tree / "megatron/core/transformer/moe/router.py").read_bytes() == before


def test_the_probe_trains_from_an_application(environment: Environment, application: Path) -> None:
    arguments = ["check", "--probe", "--json", "--megatron", str(ensure_release(NEWEST))]
    done = run(environment, str(application), *arguments)
    assert json.loads(done.stdout)["verdict"] == "fits", done.stderr


@pytest.mark.parametrize("version", pythons())
def test_every_python_reads_the_data_from_a_zip(version: str, application: Path, tmp_path: Path) -> None:
    made = Environment.make(tmp_path / "env", base=pythons()[version])
    made.borrow_packages("wrapt", "packaging")
    program = """
from megatron_fp32_router.patching.fingerprints import known
from megatron_fp32_router.source_patches import lines
print(len(known().releases), sum(bool((line.home / patch).read_bytes()) for line in lines() for patch in line.patches))
"""
    patches = sum(len(series.read_text().split()) for series in (ROOT / "patches").glob("*.series"))
    done = made.run(program, application)
    assert (done.stdout, done.stderr) == (f"{len(RELEASES)} {patches}\n", "")


# Two copies ------------------------------------------------------------------------------------------------------


def renamed(folder: Path, old: str, new: str, *files: str) -> Path:
    """A copy of the package in which one name is another, as a later version might have it."""
    copy_to(folder)
    for file in files:
        text = (folder / PACKAGE / file).read_text(encoding="utf-8")
        assert old in text
        (folder / PACKAGE / file).write_text(text.replace(old, new), encoding="utf-8")
    return folder


def test_doctor_names_both_copies_and_says_which_one_runs(environment: Environment, tmp_path: Path) -> None:
    first = renamed(tmp_path / "first", '__version__ = "', '__version__ = "9.', "version.py")
    second = copy_to(tmp_path / "second")
    archive = tmp_path / "third.pyz"
    zipapp.create_archive(second, archive, main="megatron_fp32_router.cli:main")
    link = tmp_path / "link"
    link.symlink_to(first)  # the same copy once more is none
    path = os.pathsep.join(map(str, (first, second, archive, link, first)))
    arguments = ["-m", PACKAGE, "doctor", "--json", "--megatron", str(ensure_release(NEWEST))]
    done = run(environment, *arguments, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    said = [finding["text"] for finding in json.loads(done.stdout)["findings"] if finding["about"] == "plugin"]
    version = json.loads(run(environment, *arguments, PYTHONPATH=str(second)).stdout)["plugin"]["version"]
    assert said == [
        f"9.{version}, not installed: found on the path only ({first}/{PACKAGE})",
        f"another copy on the path, {version}, which does not run: {second}/{PACKAGE}",
        f"another copy on the path, {version}, which does not run: {archive}/{PACKAGE}",
    ]


#: Loads the plugin from two folders, one after the other; Megatron is imported after the first or after the second.
TWICE = """
import sys
first, second, moment = sys.argv[1:]
plugins = []
for folder in (first, second):
    sys.path.insert(0, folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "megatron_fp32_router"]:
        del sys.modules[name]
    import megatron_fp32_router
    plugins.append(megatron_fp32_router)
    if moment == "between":
        import megatron.core.transformer.moe.router
import megatron.core.transformer.moe.router as router
print(router.Router.gating.__code__.co_filename)
for plugin in plugins:
    print(*{(record.state, record.detail) for record in plugin.status() if record.id == "gating"})
try:
    plugins[0].disable()
    print("disabled")
except plugins[0].DisplacedPatchError as error:
    print(error)
"""


@pytest.mark.parametrize("moment", ["between", "after"])
def test_of_two_copies_in_a_process_the_one_that_does_not_run_is_displaced(
    moment: str, environment: Environment, tmp_path: Path
) -> None:
    copies = [copy_to(tmp_path / name) for name in ("first", "second")]
    arguments = ["-c", TWICE, *map(str, copies), moment]
    done = run(environment, *arguments, PYTHONPATH=str(ensure_release("0.16.1")))
    file, *states = done.stdout.splitlines()[:3]
    runs = next(index for index, copy in enumerate(copies) if file.startswith(str(copy)))
    here, there = (copies[index] / PACKAGE for index in (runs, 1 - runs))
    assert states[runs].startswith("('applied'"), done.stderr
    assert states[1 - runs] == f"('displaced', 'what runs is from the copy of the plugin in {here}')"
    assert f"its functions run, not those in {there}" in done.stderr
    assert f"{environment.python} -m megatron_fp32_router doctor" in done.stderr


def test_a_copy_below_another_one_is_displaced_and_cannot_be_lifted_out(
    environment: Environment, tmp_path: Path
) -> None:
    # Where one version marks its functions otherwise than the other, each puts its own function there.
    lower = copy_to(tmp_path / "lower")
    upper = renamed(tmp_path / "upper", "__megatron_fp32_router_factory__", "__made_by__", "patching/owner.py")
    arguments = ["-c", TWICE, str(lower), str(upper), "between"]
    done = run(environment, *arguments, PYTHONPATH=str(ensure_release("0.16.1")))
    file, below, above, disabled = done.stdout.splitlines()
    assert file.startswith(str(upper)), done.stderr
    assert above == "('applied', '')"
    assert below == f"('displaced', 'wrapped by the copy of the plugin in {upper / PACKAGE}')"
    assert f"wrapped by the copy of the plugin in {upper / PACKAGE} since; take that off first" in disabled
