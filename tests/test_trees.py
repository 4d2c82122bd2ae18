"""Where scripts/test gets checkouts of the repository from: an archive, or a commit from git, or it says why not."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

import bootstrap
import pytest
from bootstrap import RELEASES, TREES, TREES_BY_HAND, TREES_IN_WHOLE, SetupError, ensure_tree

NAME = "core_v0.19.0"


@pytest.fixture(autouse=True)
def _nothing_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bootstrap, "TREES_FOLDER", tmp_path / "archives")
    monkeypatch.setattr(bootstrap, "UPSTREAM", str(tmp_path / "upstream"))


def checkout(folder: Path) -> Path:
    (folder / "megatron").mkdir(parents=True)
    (folder / "megatron" / "here").touch()
    return folder


def test_every_release_line_has_a_checkout_that_is_not_left_to_hand() -> None:
    run = [name for name in TREES if name not in TREES_BY_HAND]
    lines = {name.removeprefix("core_v").rpartition(".")[0] for name in run if name.startswith("core_v")}
    assert lines == {release.rpartition(".")[0] for release in RELEASES}


def test_the_oldest_and_the_newest_release_and_main_run_every_test_in_the_whole_run() -> None:
    releases = [name for name in TREES if name.startswith("core_v")]
    assert {releases[0], releases[-1]} < set(TREES_IN_WHOLE)
    assert any(name.startswith("main") for name in TREES_IN_WHOLE)


def test_an_archive_is_unpacked_once(tmp_path: Path) -> None:
    (tmp_path / "archives").mkdir()
    archive = tmp_path / "archives" / f"{NAME}.tar.xz"
    with tarfile.open(archive, "w:xz") as packed:
        packed.add(checkout(tmp_path / NAME), arcname=NAME)
    tree = ensure_tree(NAME, fetch=False)
    assert (tree / "megatron" / "here").exists()
    archive.unlink()
    assert ensure_tree(NAME, fetch=False) == tree
    assert [path.name for path in tree.parent.iterdir()] == [NAME]


def test_where_there_is_no_archive_git_fetches_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-C", str(checkout(tmp_path / "upstream")), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    monkeypatch.setitem(TREES, NAME, commit)
    assert (ensure_tree(NAME) / "megatron" / "here").exists()


@pytest.mark.parametrize(("fetch", "why"), [(True, "git .* failed:"), (False, "there is no .*core_v0.19.0.tar.xz")])
def test_where_there_is_neither_it_says_so_and_leaves_nothing(fetch: bool, why: str, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=why):
        ensure_tree(NAME, fetch=fetch)
    assert not list((tmp_path / "cache").rglob("core*"))
