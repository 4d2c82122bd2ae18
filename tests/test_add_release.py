"""scripts/add-release on a copy of this repository from which the newest release has been taken out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from bootstrap import NEWEST, RELEASES, ROOT
from installing import copy_of_repository


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository without the newest release."""
    folder = copy_of_repository(tmp_path_factory.mktemp("copy"))
    (folder / "scripts" / "releases.txt").write_text("\n".join(RELEASES[:-1]) + "\n", encoding="utf-8")
    run(folder, "fingerprints")
    run(folder, "docs")
    return folder


def run(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"scripts/{script}", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_newest_release_taken_out_and_added_again_is_known_as_before(copy: Path) -> None:
    generated = [
        "scripts/releases.txt",
        "megatron_fp32_router/patching/fingerprints.json",
        "megatron_fp32_router/patching/known_files.json",
        *(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")),
    ]
    # Its files are byte for byte those of the release before it, so known_files.json is the same without it.
    assert all((copy / name).read_bytes() != (ROOT / name).read_bytes() for name in generated[:2])
    done = run(copy, "add-release", NEWEST)
    assert f"{NEWEST} is written down" in done.stderr, done.stderr
    assert "patches good on" in done.stdout + done.stderr
    assert [name for name in generated if (copy / name).read_bytes() != (ROOT / name).read_bytes()] == []


def test_only_a_new_release_is_added_and_otherwise_nothing_is_written(copy: Path) -> None:
    before = (copy / "scripts" / "releases.txt").read_bytes()
    for name, said in ((RELEASES[0], "is among the known releases already"), ("main", "is not a release")):
        done = run(copy, "add-release", name)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert (copy / "scripts" / "releases.txt").read_bytes() == before
