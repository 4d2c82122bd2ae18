"""What scripts/test and scripts/demo need before anything else: an environment and the Megatron releases.

Only the standard library may be imported here: this runs on a machine with nothing but Python and pip, before
the environment that it makes exists.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent

#: Every megatron-core on PyPI whose router has an expert bias, oldest first: the one list of them.
RELEASES = tuple((ROOT / "scripts" / "releases.txt").read_text(encoding="utf-8").split())

#: The last patch release of every line: 0.12.3 of 0.12.
LAST_OF_LINE = tuple({version.rpartition(".")[0]: version for version in RELEASES}.values())

#: Releases whose optimizer code differs from that of the last release of their line (scripts/docs_resume.py says so).
OTHER_OPTIMIZERS = ("0.17.0",)

#: On these the slowest tests, which save and resume, run only with `scripts/test --middle`.
MIDDLE = (*LAST_OF_LINE[1:-1], *OTHER_OPTIMIZERS)

#: Checkouts of the repository that tests train on -> commit. In the whole run, those marked whole run every test of
#: tests/trees, those marked always run some; those marked middle run the same with --middle, those marked by-hand none.
#: One that is named runs all of them.
_TREES = [line.split() for line in (ROOT / "scripts" / "trees.txt").read_text(encoding="utf-8").splitlines()]
TREES = {name: commit for name, commit, _ in _TREES}
TREES_BY_HAND = tuple(name for name, _, when in _TREES if when == "by-hand")
TREES_IN_MIDDLE = tuple(name for name, _, when in _TREES if when == "middle")
TREES_IN_WHOLE = tuple(name for name, _, when in _TREES if when == "whole")

#: A folder of archives of them, NAME.tar.xz; where there is none, `git` fetches the commits.
TREES_FOLDER = Path(os.environ.get("MEGATRON_TREES") or ROOT.parent / "shared" / "trees")
UPSTREAM = "https://github.com/NVIDIA/Megatron-LM"

#: What development and the demo use when no release is named.
NEWEST = RELEASES[-1]

#: The torch on which the matrix is known to pass; other Pythons take what the package itself asks for.
TORCH = "torch==2.13.0" if sys.version_info[:2] == (3, 11) else "torch>=2.4"

#: The version whose FusedAdam the tests use; the wheel transformer-engine holds Python only.
TRANSFORMER_ENGINE = "2.20.2"

#: For tests of Muon and others: distribution, version and package, with what it imports.
EMERGING_OPTIMIZERS = (("emerging-optimizers", "0.3.0", "emerging_optimizers"), ("absl-py", "2.5.1", "absl"))

#: The version that tests/downstream runs.
MEGATRON_BRIDGE = "0.6.2"

#: A release has wheels for some Pythons only (0.11 to 0.13: up to 3.11). The parts that are used here are not
#: compiled, so the first wheel found serves every Python.
WHEEL_PYTHONS = ("3.12", "3.11", "3.10")


if sys.version_info < (3, 10):  # noqa: UP036 - the user's Python may be older
    print(
        f"{sys.argv[0]} needs Python 3.10 or newer; this is {platform.python_version()} ({sys.executable}).\n"
        f"Run it with a newer one, for example: python3.12 {' '.join(sys.argv)}",
        file=sys.stderr,
    )
    raise SystemExit(2)


class SetupError(Exception):
    """The environment or a release could not be made or fetched; the text says why and what to do."""


def say(text: str) -> None:
    """Report progress on standard error: standard output belongs to the results."""
    # In one write: the lines of steps that run side by side would mix otherwise.
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def environment_without_plugin(**variables: str) -> dict[str, str]:
    """The caller's environment without the plugin's variables, and with *variables*."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MEGATRON_FP32_ROUTER")}
    return kept | variables


def run_package(python: str, name: str, arguments: list[str], **variables: str) -> int:
    """Run a package of this folder with an interpreter, and return the exit code."""
    paths = [str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
    # With the plugin's messages, every model would add a line.
    variables |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "MEGATRON_FP32_ROUTER_LOG": "warning"}
    command = [python, "-W", "ignore", "-m", name, *arguments]
    return subprocess.run(command, env=environment_without_plugin(**variables), check=False).returncode


def ensure_environment(extra: str) -> Path:
    """Make `.venv` with this Python, install the package with *extra* into it, and return its interpreter.

    A stamp records what was installed, so that a second call costs nothing until pyproject.toml, the extra or
    the Python changes. The repository itself is installed in place: edits need no new installation.
    """
    home = ROOT / ".venv"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = home / f"installed-{extra}"
    wanted = _fingerprint(extra)
    if python.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python

    started = time.monotonic()
    if not _is_ours(home, python):
        say(f"Making the environment .venv with Python {platform.python_version()} ...")
        shutil.rmtree(home, ignore_errors=True)
        _make_environment(home)

    # torch goes first and by itself: it is the one large download. A package index may offer a CPU build of it.
    say(f"Installing {TORCH} (the largest part; minutes on a slow connection) ...")
    _pip(python, "install", TORCH)
    say(f"Installing the package in place, with its extra '{extra}' ...")
    _pip(python, "install", "--editable", f"{ROOT}[{extra}]")
    stamp.write_text(wanted, encoding="utf-8")
    say(f"Environment ready after {time.monotonic() - started:.0f} s.")
    return python


def ensure_release(version: str) -> Path:
    """Return a folder that holds megatron-core *version* as `megatron/`, fetching it once.

    It is only unpacked, not installed: one environment serves all releases, one folder on the path each.
    """
    if version not in RELEASES and not (_cache("releases") / version / "megatron").is_dir():
        raise SetupError(f"Megatron {version!r} is not among the releases: {', '.join(RELEASES)}")
    return ensure_wheel("megatron-core", version, holds="megatron", folder=f"releases/{version}")


def ensure_wheel(name: str, version: str, *, holds: str, folder: str) -> Path:
    """Return the *folder* of the cache that holds the package *holds* out of a wheel, fetching it once."""
    tree = _cache(folder)
    if (tree / holds).is_dir():
        return tree
    say(f"Fetching {name} {version} ...")
    with _beside(tree, holds) as work:
        with zipfile.ZipFile(_download(f"{name}=={version}", work)) as wheel:
            wheel.extractall(work / "tree")
        if not (work / "tree" / holds).is_dir():
            raise SetupError(f"the wheel of {name} {version} holds no {holds!r} folder")
    return tree


def ensure_transformer_engine() -> Path:
    """Return a folder that holds TransformerEngine's Python, and no compiled part, as `transformer_engine/`."""
    folder = f"transformer-engine/{TRANSFORMER_ENGINE}"
    return ensure_wheel("transformer-engine", TRANSFORMER_ENGINE, holds="transformer_engine", folder=folder)


def ensure_emerging_optimizers() -> list[Path]:
    """Return the folders that hold `emerging_optimizers` and what it imports. Unpacked: it asks for Python 3.12."""
    return [
        ensure_wheel(name, version, holds=holds, folder=f"packages/{name}-{version}")
        for name, version, holds in EMERGING_OPTIMIZERS
    ]


def ensure_consumers(python: Path) -> tuple[Path, Path]:
    """Return the folders that hold the frameworks of tests/downstream; `python` installs them there once."""
    # Unpacked, as pip would refuse it: it asks for a newer Python than it needs.
    bridge = ensure_wheel(
        "megatron-bridge", MEGATRON_BRIDGE, holds="megatron", folder=f"downstream/megatron-bridge-{MEGATRON_BRIDGE}"
    )
    requirements = ROOT / "tests" / "downstream" / "requirements.txt"
    digest = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = _cache("downstream") / digest
    if (folder / "mbridge").is_dir():
        return bridge, folder
    say("Installing the frameworks of tests/downstream (a minute) ...")
    with _beside(folder, "mbridge") as work:
        target = ("--target", str(work / "tree"))
        _pip(python, "install", "--no-deps", *target, "--requirement", str(requirements))
    return bridge, folder


def ensure_tree(name: str, *, fetch: bool = True) -> Path:
    """Return a folder that holds the checkout *name* of the repository, unpacking or (if *fetch*) fetching it once."""
    tree = _cache("trees") / name
    if (tree / "megatron").is_dir():
        return tree
    archive = TREES_FOLDER / f"{name}.tar.xz"
    if not (archive.is_file() or fetch):
        raise SetupError(f"there is no {archive}, and fetching another checkout has just failed")
    with _beside(tree, "megatron") as work:
        if archive.is_file():
            say(f"Unpacking {archive} ...")
            with tarfile.open(archive) as packed:
                # Old Pythons have no filter and trust every archive.
                if hasattr(tarfile, "data_filter"):
                    packed.extractall(work, filter="data")
                else:
                    packed.extractall(work)
            (work / name).rename(work / "tree")
        else:
            say(f"Fetching commit {TREES[name]} of {UPSTREAM} for {name} ...")
            git = ("git", "-C", str(work / "tree"), "-c", "http.lowSpeedLimit=1000", "-c", "http.lowSpeedTime=30")
            _run("git", "init", "--quiet", str(work / "tree"))
            _run(*git, "fetch", "--quiet", "--depth", "1", UPSTREAM, TREES[name])
            _run(*git, "checkout", "--quiet", "FETCH_HEAD")
    return tree


def _cache(kind: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "megatron-fp32-router" / kind


@contextlib.contextmanager
def _beside(tree: Path, holds: str) -> Iterator[Path]:
    """A new folder in which the caller makes `tree/`, which is then renamed *tree*: several processes may make one."""
    tree.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tree.parent, prefix=f".{tree.name}-") as work:
        yield Path(work)
        try:
            (Path(work) / "tree").rename(tree)
        except OSError:
            # Another process was first, and its copy is as good.
            if not (tree / holds).is_dir():
                raise


def _run(*command: str) -> None:
    """Run *command*, without letting it ask for a password.

    Raises:
        SetupError: it failed, or is not there, or takes more than ten minutes.
    """
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SetupError(f"{command[0]}: {error}") from None
    if done.returncode:
        raise SetupError(f"{' '.join(command)} failed:\n{_tail(done.stderr)}")


def _fingerprint(extra: str) -> str:
    """A digest of everything that decides what is installed."""
    digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes())
    digest.update(f"{extra} {TORCH} {sys.version} {ROOT}".encode())
    return digest.hexdigest()


def _is_ours(home: Path, python: Path) -> bool:
    """Whether *home* is a working environment of this Python version that has not been moved."""
    if not python.exists():
        return False
    look = "import sys; print(sys.version); print(sys.prefix)"
    found = subprocess.run([python, "-c", look], capture_output=True, text=True, check=False)
    return found.returncode == 0 and found.stdout.strip() == f"{sys.version}\n{home}"


def _make_environment(home: Path) -> None:
    try:
        venv.create(home, with_pip=True)
    except (subprocess.CalledProcessError, SystemExit, ImportError):
        # Debian ships Python without ensurepip. _pip then uses the pip of the Python that runs this.
        shutil.rmtree(home, ignore_errors=True)
        venv.create(home, with_pip=False)


def _pip(python: Path, *arguments: str) -> None:
    has_pip = subprocess.run([python, "-c", "import pip"], capture_output=True, check=False).returncode == 0
    command = [str(python), "-m", "pip"] if has_pip else [sys.executable, "-m", "pip", "--python", str(python)]
    command += [arguments[0], "--disable-pip-version-check", "--no-input", "--quiet", *arguments[1:]]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise SetupError(f"pip could not do '{' '.join(arguments)}':\n{_tail(done.stdout)}")


def _download(requirement: str, folder: Path) -> Path:
    """Fetch the wheel of *requirement* into *folder*."""
    complaints = []
    for python_version in WHEEL_PYTHONS:
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
        command += ["--quiet", "--no-deps", "--ignore-requires-python", "--only-binary=:all:"]
        command += ["--python-version", python_version, "--dest", str(folder), requirement]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        wheels = list(folder.glob("*.whl"))
        if done.returncode == 0 and wheels:
            return wheels[0]
        complaints.append(f"looking for a wheel for Python {python_version}:\n{_tail(done.stdout)}")
    raise SetupError(f"{requirement} could not be fetched.\n" + "\n".join(complaints))


def _tail(output: str) -> str:
    return "\n".join("    " + line for line in output.strip().splitlines()[-15:])


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn a SetupError into its text and exit code 2, without a traceback."""
    try:
        yield
    except SetupError as error:
        say(f"\n{error}")
        raise SystemExit(2) from None
