"""Find Megatron: the installed one, or that in a folder which the user names. It is never imported."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

from megatron_fp32_router.errors import Fp32RouterError
from megatron_fp32_router.patching.megatron import Megatron, read_version


class NoMegatronError(Fp32RouterError):
    """There is no Megatron where one was expected. The text says what was found and what to do."""


def installed() -> list[Path]:
    """The roots (folders that hold `megatron/core`) on this interpreter's path, the one an import takes first.

    `megatron` is a namespace package: its parts may lie in several places, and only `find_spec` knows all of them,
    editable installs included. Finding a top-level package imports nothing.
    """
    try:
        spec = importlib.util.find_spec("megatron")
    except (ImportError, ValueError, AttributeError):
        return []  # an incomplete `megatron` in sys.modules; the caller reports that none was found
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return [Path(place).parent for place in dict.fromkeys(places) if (Path(place) / "core").is_dir()]


def root(given: str | None) -> Path:
    """The folder that holds `megatron/`: what the user named, or the installed one.

    Raises:
        NoMegatronError: there is none, or it may not be looked for.
    """
    try:
        return _root(given)
    except (OSError, ValueError) as error:  # no permission, a name that is too long, a zero byte in it
        where = "looking for an installed Megatron" if given is None else f"--megatron {_short(given)}"
        raise NoMegatronError(f"{where}: {getattr(error, 'strerror', None) or error}") from error


def _short(name: str) -> str:
    return name if len(name) <= 200 else f"{name[:200]}…"


def _root(given: str | None) -> Path:
    if given is None:
        found = installed()
        if not found:
            raise NoMegatronError(
                "no Megatron is installed in this interpreter; name a checkout, a fork or an unpacked wheel with "
                "--megatron PATH"
            )
        return found[0]
    path = Path(given).absolute()
    if ".." in path.parts:
        path = path.resolve()  # only then, so that a link keeps the name that the user gave
    if not path.exists():
        raise NoMegatronError(f"--megatron {given}: no such path")
    if path.suffix == ".whl":
        raise NoMegatronError(f"--megatron {given}: a wheel; unpack it first (python -m zipfile -e {path.name} FOLDER)")
    # The folder that holds `megatron/`, that folder itself, or its `core`.
    for candidate in (path, path.parent, path.parent.parent):
        if (candidate / "megatron" / "core").is_dir() and path in (
            candidate,
            candidate / "megatron",
            candidate / "megatron" / "core",
        ):
            return candidate
    if (path / "megatron" / "model").is_dir():
        raise NoMegatronError(
            f"--megatron {given}: a Megatron-LM from before megatron-core, older than any release of it"
        )
    raise NoMegatronError(f"--megatron {given}: no Megatron; expected a folder that holds megatron/core")


def megatron(root: Path) -> Megatron:
    """The Megatron in `root`, with the version that it states.

    Raises:
        NoMegatronError: `package_info.py` does not say which version it is.
    """
    core = root / "megatron" / "core"
    version = read_version(core / "package_info.py")
    if version is None:
        raise NoMegatronError(
            f"{core / 'package_info.py'} does not say which version this is (MAJOR, MINOR, PATCH): not a "
            "megatron-core, or a truncated checkout"
        )
    return Megatron(core, version)


def commit(root: Path) -> str:
    """The commit of a tree that is a clone or a submodule.

    Raises:
        NoMegatronError: it is neither, or git is not installed.
    """
    try:
        asked = ["git", "-C", str(root), "rev-parse", "HEAD"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NoMegatronError(f"--pin: git, which knows the commit, cannot run: {error.strerror or error}") from error
    if done.returncode:
        raise NoMegatronError(f"--pin: git cannot tell the commit of {root}: {done.stderr.strip()}")
    return done.stdout.strip()
