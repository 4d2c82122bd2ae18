"""The plugin installed for real: a wheel, built here, in new environments that borrow wrapt and torch."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: What an environment holds for the plugin at the root of its site-packages, beside the package.
STARTUP_FILES = ("_megatron_fp32_router_startup.py", "megatron_fp32_router.pth", "megatron_fp32_router.start")


def build_wheel(folder: Path) -> Path:
    """Build the wheel with what is installed here; nothing is fetched."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@dataclass(frozen=True)
class Environment:
    """A virtual environment without pip. What is to be in it is put into `site`."""

    python: Path
    site: Path

    @classmethod
    def make(cls, home: Path, base: str | None = None) -> Environment:
        """Make one for *base*, an interpreter, or for the one that runs the tests."""
        if base is None:
            # Links, or the interpreter would not find its own libraries.
            venv.create(home, with_pip=False, symlinks=os.name != "nt")
        else:
            subprocess.run([base, "-m", "venv", "--without-pip", str(home)], check=True, capture_output=True)
        python = home / "bin" / "python"
        look = "import sysconfig; print(sysconfig.get_path('purelib'))"
        found = subprocess.run([python, "-c", look], check=True, capture_output=True, text=True)
        return cls(python, Path(found.stdout.strip()))

    def install(self, wheel: Path) -> None:
        """Unpack *wheel*, which for a wheel of pure Python is all that installing does, its scripts aside."""
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(self.site)

    def borrow(self, name: str = "zz_borrowed.pth") -> None:
        """Add our site-packages to the path, without its .pth files. Read after ours: 'zz'."""
        (self.site / name).write_text("\n".join(map(str, self.borrowed_paths())) + "\n", encoding="utf-8")

    def borrowed_paths(self) -> list[Path]:
        """What `borrow` puts on the path."""
        return [Path(sysconfig.get_path("purelib"))]

    def borrow_packages(self, *names: str) -> None:
        """Copy single packages of ours that another Python can use too: without what is compiled for ours."""
        for name in names:
            source = Path(sysconfig.get_path("purelib")) / name
            shutil.copytree(source, self.site / name, ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))

    def run(self, program: str, *paths: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run *program* with *paths* on its path and *variables* set; no other variable of the plugin is."""
        return subprocess.run(
            [self.python, "-c", program],
            # Not here: -c puts the current folder on the path, and the package lies in it.
            cwd=self.python.parent,
            env=clean_environment(*paths, **variables),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


def clean_environment(*paths: Path, **variables: str) -> dict[str, str]:
    """Our environment without any variable of the plugin's or of Python's, and then *variables*."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MEGATRON_FP32_ROUTER", "PYTHON", "COV_"))
    }
    return kept | {"PYTHONPATH": os.pathsep.join(map(str, paths))} | variables


#: The Pythons that the package is for.
VERSIONS = ("3.10", "3.11", "3.12", "3.13")


@functools.cache
def pythons() -> dict[str, str]:
    """Version -> interpreter: ours, and every other from 3.10 to 3.13 that is on this machine and really runs."""
    found = {f"{sys.version_info.major}.{sys.version_info.minor}": sys.executable}
    for version in VERSIONS:
        candidates = [shutil.which(f"python{version}")]
        candidates += sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")))
        for candidate in filter(None, candidates):
            look = "import sys, venv; print(*sys.version_info[:2], sep='.')"
            asked = subprocess.run([candidate, "-c", look], capture_output=True, text=True, check=False)
            if version not in found and asked.stdout.strip() == version:
                found[version] = candidate
    return found


def copy_of_repository(folder: Path) -> Path:
    """The repository's files as they are now, committed or not."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder
