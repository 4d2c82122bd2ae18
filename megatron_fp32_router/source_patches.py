"""Applying patches/ to a Megatron tree that cannot be patched while it runs: `megatron-fp32-router patch`.

Whether a tree is released or patched is decided by the content of the files that the patches touch, not by its version
or its history: `LINE.files` beside `LINE.series` has their sha256, as released and as patched. Patches are applied to
copies. At the end these replace the files of the tree, one rename each; if a rename fails, all files are put back.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_fp32_router.errors import Fp32RouterError
from megatron_fp32_router.patching.megatron import read_version
from megatron_fp32_router.terminal import refuse, tell

if TYPE_CHECKING:
    from importlib.abc import Traversable  # importlib.resources.abc from Python 3.11 on

_PACKAGE: Any = files("megatron_fp32_router")  # a Path, or a zipfile.Path; both have a parent

#: Inside the package where it is installed, beside it in a checkout. Either may be in a zip.
HOMES: tuple[Traversable, ...] = (_PACKAGE / "patches", _PACKAGE.parent / "patches")

State = Literal["released", "patched", "half patched"]


class UnknownTreeError(Fp32RouterError):
    """There is no Megatron, or none that the patches were made for."""


class DirtyTreeError(Fp32RouterError):
    """A file that the patches touch is neither as released nor as patched."""


@dataclass(frozen=True)
class Line:
    """The patches for one line of releases.

    Attributes:
        name: for example core_v0.19.
        home: the folder with the patches of all lines.
        patches: their names there, in the order in which they go in. Lines whose code is alike share them.
        files: what they change: path below the root of the tree -> sha256 as a release of the line has the file ->
            sha256 of what the patches make of it.
    """

    name: str
    home: Traversable
    patches: tuple[str, ...]
    files: dict[str, dict[str, str]]


def lines() -> list[Line]:
    """Every line that there are patches for, oldest first.

    Raises:
        UnknownTreeError: the patches are not where they belong.
    """
    home = next((home for home in HOMES if home.is_dir()), None)
    if home is None:
        raise UnknownTreeError(f"this installation lacks the source patches (looked in {', '.join(map(str, HOMES))})")
    names = [file.name.removesuffix(".series") for file in home.iterdir() if file.name.endswith(".series")]
    return [_line(home, name) for name in sorted(names, key=lambda name: int(name.rpartition(".")[2]))]


def _line(home: Traversable, name: str) -> Line:
    patches = (home / f"{name}.series").read_text(encoding="utf-8").split()
    changed: dict[str, dict[str, str]] = {}
    table = home / f"{name}.files"
    for row in table.read_text(encoding="utf-8").splitlines() if table.is_file() else []:
        if row and not row.startswith("#"):
            released, patched, path, *_ = row.split()
            changed.setdefault(path, {})[released] = patched
    return Line(name, home, tuple(patches), dict(sorted(changed.items())))


def title(line: Line, patch: str) -> str:
    """The first line of a patch's DEP-3 description."""
    first = (line.home / patch).read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("Description: ")


def find_line(root: Path) -> Line:
    """The line that the Megatron at `root` belongs to.

    Raises:
        UnknownTreeError: no such folder, no Megatron in it, or one of another line.
    """
    package = root / "megatron" / "core"
    if not package.is_dir():
        raise UnknownTreeError(f"no megatron/core below {root}: expected the root of a Megatron-LM checkout")
    version = read_version(package / "package_info.py")
    if version is None:
        raise UnknownTreeError(f"{package / 'package_info.py'} does not say which version this is")
    known = lines()
    for line in known:
        if line.name == f"core_v{version.major}.{version.minor}":
            return line
    names = ", ".join(line.name for line in known)
    raise UnknownTreeError(f"there are no patches for Megatron-Core {version} ({root}); there are some for {names}")


def sha256(content: bytes) -> str:
    """As the tables `files` have it."""
    return hashlib.sha256(content).hexdigest()


def state(root: Path, line: Line) -> State:
    """What the files that `line` touches are now.

    Raises:
        UnknownTreeError: one of them is missing or cannot be read.
        DirtyTreeError: one of them is something else; the message names it.
    """
    found, strange = set(), []
    for path, released in line.files.items():
        sha = sha256(_read(root / path))
        if sha in released:
            found.add("released")
        elif sha in released.values():
            found.add("patched")
        else:
            strange.append(path)
    if strange:
        raise DirtyTreeError(
            f"{root} is neither {line.name} as released nor as patched: {', '.join(strange)} "
            f"{'differs' if len(strange) == 1 else 'differ'}. Undo the changes there (git stash), or merge the patches "
            f"by hand, in the order of {line.home / (line.name + '.series')}."
        )
    if len(found) > 1:
        return "half patched"
    return "patched" if "patched" in found else "released"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnknownTreeError(f"cannot read {path}: {error.strerror}") from error


def change(root: Path, line: Line, *, reverse: bool = False) -> list[str]:
    """Apply the patches of `line` to the tree at `root`, or take them back. A half patched tree is completed.

    Returns:
        The files that were changed, none where nothing was left to do.

    Raises:
        UnknownTreeError: see `state`; also when git is missing or the files cannot be written.
        DirtyTreeError: see `state`. After an error nothing has changed, unless the message names files that could not
            be put back.
    """
    state(root, line)
    contents = {path: _read(root / path) for path in line.files}
    goals: dict[str, str] = {}
    for path, released in line.files.items():
        steps = {after: before for before, after in released.items()} if reverse else released
        goal = steps.get(sha256(contents[path]))
        if goal is not None:
            goals[path] = goal
    after = _patched({path: contents[path] for path in goals}, line, reverse) if goals else {}
    wrong = [path for path, goal in goals.items() if sha256(after[path]) != goal]
    if wrong:
        raise UnknownTreeError(f"the patches of {line.name} made something else of {', '.join(wrong)} than recorded")
    _install(root, after)
    return sorted(goals)


def _patched(contents: dict[str, bytes], line: Line, reverse: bool) -> dict[str, bytes]:
    """What the patches make of `contents`, in a new folder: git apply skips what is above its folder."""
    with tempfile.TemporaryDirectory(prefix="fp32-router-patch-") as name:
        work = Path(name).resolve()
        for path, content in contents.items():
            (work / path).parent.mkdir(parents=True, exist_ok=True)
            (work / path).write_bytes(content)
        run_patches(work, line, list(contents), reverse=reverse)
        return {path: (work / path).read_bytes() for path in contents}


def run_patches(folder: Path, line: Line, only: list[str], *, reverse: bool = False) -> None:
    """Apply the patches of `line`, or take them back, in the files `only` in `folder`, which belongs to no repository.

    Raises:
        UnknownTreeError: git is missing, or a patch does not apply; its own message is included.
    """
    # Leave out a repository around the folder, and the user's settings (autocrlf, whitespace).
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {
        "GIT_CEILING_DIRECTORIES": str(folder.parent),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
    }
    include = [f"--include={path}" for path in only]
    for patch in reversed(line.patches) if reverse else line.patches:
        command = ["git", "apply", *(["--reverse"] if reverse else []), *include, "-"]
        content = (line.home / patch).read_bytes()
        try:
            done = subprocess.run(command, cwd=folder, env=environment, input=content, capture_output=True, check=False)
        except FileNotFoundError as error:
            raise UnknownTreeError("git was not found; it is what applies the patches. Install it first.") from error
        if done.returncode:
            raise UnknownTreeError(f"{patch} does not apply: {done.stderr.decode(errors='replace').strip()}")


def _install(root: Path, after: dict[str, bytes]) -> None:
    """Replace the files, all or none. A failure before the first rename leaves no trace.

    A copy of each file is kept beside it until all are replaced. If one cannot be replaced, the copies of those that
    were are renamed back; files that were not replaced are not touched at all.
    """
    new = {path: (root / path).with_name(f".{Path(path).name}.fp32-router") for path in after}
    kept = {path: (root / path).with_name(f".{Path(path).name}.fp32-router-kept") for path in after}
    try:
        for path, beside in new.items():
            beside.write_bytes(after[path])
            shutil.copymode(root / path, beside)
            shutil.copy2(root / path, kept[path])
        try:
            for path, beside in new.items():
                beside.replace(root / path)
        except BaseException as error:
            # New content that is not beside its file has been renamed. os.path.exists never raises: a file that cannot
            # be seen counts as renamed.
            renamed = [path for path, beside in new.items() if not os.path.exists(beside)]
            stuck = _put_back(root, {path: kept[path] for path in renamed})
            if stuck:
                raise UnknownTreeError(
                    f"{root} is half changed: {error}; then {', '.join(stuck)} could not be put back. Every other file "
                    "is as it was. When the files can be written again, the same command completes it, with --reverse "
                    "or without."
                ) from error
            raise
    except OSError as error:
        raise UnknownTreeError(f"nothing was changed: cannot write below {root}: {error}") from error
    finally:
        for beside in (*new.values(), *kept.values()):
            with contextlib.suppress(OSError):  # it was renamed or never written, or nothing can be written any more
                beside.unlink()


def _put_back(root: Path, kept: dict[str, Path]) -> list[str]:
    """Give files their former content; return those where that fails."""
    stuck = []
    for path, copy in kept.items():
        try:
            copy.replace(root / path)
        except OSError:
            stuck.append(path)
    return stuck


def main(root: Path, *, check: bool, reverse: bool) -> int:
    """Run the command, print what it did or found, or on standard error why it did nothing; return the exit code."""
    try:
        line = find_line(root)
        now = state(root, line)
        wanted: State = "released" if reverse else "patched"
        if check:
            print(f"{root}: {line.name}, {now} ({len(line.patches)} patches, {len(line.files)} files)")
            return 0 if now == wanted else 1
        changed = change(root, line, reverse=reverse)
    except DirtyTreeError as error:
        tell("patch", str(error))
        return 1
    except (UnknownTreeError, OSError) as error:
        return refuse("patch", str(error))
    if not changed:
        print(f"{root}: {line.name}, {now} already; nothing to do")
        return 0
    for patch in line.patches:
        print(f"{'took back' if reverse else 'applied'} {patch}: {title(line, patch)}")
    print(f"{root}: {line.name}, {wanted}; changed {', '.join(changed)}")
    return 0
