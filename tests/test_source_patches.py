"""The command that writes the patches into a checkout: all or nothing, and only where they were made for.

Whether the patched source does what the plugin does is what `scripts/patches verify` finds out.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bootstrap import RELEASES, ensure_release

from megatron_fp32_router import cli, source_patches

ROOT = Path(__file__).resolve().parent.parent
LINES = {line.name: line for line in source_patches.lines()}


def line_of(release: str) -> source_patches.Line:
    return LINES[f"core_v{release.rpartition('.')[0]}"]


def checkout(release: str, root: Path) -> Path:
    """What matters of a release: the files that the patches touch, and the one that says which release it is."""
    for file in [*line_of(release).files, "megatron/core/package_info.py"]:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ensure_release(release) / file, root / file)
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return checkout(RELEASES[-1], tmp_path / "Megatron-LM")


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def patch(root: Path, *options: str) -> int:
    return cli.main(["patch", "--megatron", str(root), *options])


def test_there_are_patches_for_every_line_of_releases() -> None:
    assert list(LINES) == list(dict.fromkeys(f"core_v{release.rpartition('.')[0]}" for release in RELEASES))


@pytest.mark.parametrize("release", RELEASES)
def test_patches_go_in_and_come_out_of_every_release_without_a_trace(release: str, tmp_path: Path) -> None:
    root = checkout(release, tmp_path)
    before = content(root)
    assert patch(root, "--check") == 1
    assert patch(root, "--check", "--reverse") == 0
    assert content(root) == before
    assert patch(root) == 0
    patched = content(root)
    assert {path for path in before if patched[path] != before[path]} == line_of(release).files.keys()
    assert patched.keys() == before.keys()
    assert patch(root, "--check") == 0
    assert patch(root) == 0
    assert content(root) == patched
    assert patch(root, "--reverse") == 0
    assert content(root) == before


def test_it_says_what_it_did(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patch(tree)
    done = capsys.readouterr().out.splitlines()
    assert len(done) == len(line_of(RELEASES[-1]).patches) + 1
    assert done[0].startswith(
        "applied router-initialise-in-fp32/core_v0.16.patch: Router parameters are initialised in fp32"
    )
    patch(tree)
    assert capsys.readouterr().out == f"{tree}: core_v0.19, patched already; nothing to do\n"


def test_a_folder_inside_another_repository_is_patched_too(tmp_path: Path) -> None:
    # `git apply` there would skip every path, and report success.
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    root = checkout(RELEASES[-1], tmp_path / "third_party" / "Megatron-LM")
    assert patch(root) == 0
    assert patch(root, "--check") == 0


def test_a_tree_with_changes_of_its_own_is_refused_and_left_alone(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    touched = tree / "megatron/core/transformer/moe/router.py"
    touched.write_bytes(touched.read_bytes() + b"# mine\n")
    before = content(tree)
    for options in ([], ["--reverse"], ["--check"]):
        assert patch(tree, *options) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "megatron/core/transformer/moe/router.py differs" in said
    assert content(tree) == before


def test_changes_elsewhere_do_not_matter(tree: Path) -> None:
    (tree / "megatron/core/mine.py").write_text("x = 1\n")
    assert patch(tree) == 0


def broken_trees(tmp_path: Path) -> dict[str, Path]:
    trees = {name: tmp_path / name for name in ("nowhere", "empty", "versionless", "future", "truncated")}
    trees["empty"].mkdir()
    for name in ("versionless", "future", "truncated"):
        checkout(RELEASES[-1], trees[name])
    (trees["versionless"] / "megatron/core/package_info.py").unlink()
    info = trees["future"] / "megatron/core/package_info.py"
    info.write_text(info.read_text().replace("MINOR = 19", "MINOR = 99"))
    (trees["truncated"] / "megatron/core/transformer/moe/router.py").unlink()
    return trees


@pytest.mark.parametrize(
    ("name", "says"),
    {
        "nowhere": "no megatron/core below",
        "empty": "no megatron/core below",
        "versionless": "does not say which version",
        "future": "no patches for Megatron-Core 0.99.",
        "truncated": "cannot read",
    }.items(),
)
def test_bad_input_gives_one_line_and_exit_code_2(
    name: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = broken_trees(tmp_path)[name]
    assert patch(root) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert says in said


def test_without_git_it_says_so(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tree))
    before = content(tree)
    assert patch(tree) == 2
    assert "git was not found" in capsys.readouterr().err
    assert content(tree) == before


@pytest.mark.parametrize("failing", range(5))
def test_when_a_file_cannot_be_replaced_all_are_as_before(
    failing: int, tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(tree)
    real, calls = Path.replace, []

    def replace(self: Path, target: Any) -> Path:
        calls.append(target)
        if len(calls) == failing + 1:
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    assert patch(tree) == 2
    assert "nothing was changed" in capsys.readouterr().err
    assert content(tree) == before


def failing_renames(monkeypatch: pytest.MonkeyPatch, *failing: int) -> None:
    """The renames with these numbers, from 1 on, fail; every write into a file in place does."""
    real, calls = Path.replace, []

    def replace(self: Path, target: Any) -> Path:
        calls.append(target)
        if len(calls) in failing:
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    write = Path.write_bytes

    def write_bytes(self: Path, content: bytes) -> int:
        if self.name.startswith(".") or "megatron" not in self.parts or "fp32-router-patch-" in str(self):
            return write(self, content)
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)


def test_replaced_files_are_restored_by_renames_and_others_are_not_touched(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(tree)
    untouched = [tree / path for path in list(line_of(RELEASES[-1]).files)[2:]]
    inodes = [path.stat().st_ino for path in untouched]
    failing_renames(monkeypatch, 3)
    assert patch(tree) == 2
    assert "nothing was changed" in capsys.readouterr().err
    assert content(tree) == before
    assert [path.stat().st_ino for path in untouched] == inodes


def test_files_that_cannot_be_restored_are_named_and_the_command_can_finish_later(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(tree)
    first = next(iter(line_of(RELEASES[-1]).files))
    with monkeypatch.context() as broken:
        # The third file cannot be replaced, and then the first one cannot be put back.
        failing_renames(broken, 3, 4)
        assert patch(tree) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "nothing was changed" not in said
    assert f"half changed: [Errno 28] No space left on device; then {first} could not be put back" in said
    after = content(tree)
    assert {path for path in before if after[path] != before[path]} == {first}
    assert after.keys() == before.keys()
    assert patch(tree, "--check") == 1
    assert patch(tree, "--reverse") == 0
    assert content(tree) == before


@pytest.mark.parametrize("options", [[], ["--reverse"]])
def test_a_tree_that_a_power_cut_left_in_between_is_completed(options: list[str], tree: Path, tmp_path: Path) -> None:
    other = checkout(RELEASES[-1], tmp_path / "other")
    released = content(other)
    patch(other)
    patched = content(other)
    half = "megatron/core/transformer/moe/router.py"
    (tree / half).write_bytes(patched[half])
    assert patch(tree, "--check") == 1
    assert patch(tree, *options) == 0
    assert content(tree) == (released if options else patched)


@pytest.mark.parametrize("what", ["context", "added line"])
def test_a_broken_hunk_is_noticed_and_nothing_is_changed(
    what: str, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "patches"
    shutil.copytree(ROOT / "patches", home)
    file = home / "moe-count-tokens-in-integers/core_v0.18.patch"
    old, new = {
        "context": ("\n         ", "\n         x"),
        "added line": ("+        offset = ", "+        offset = -"),
    }[what]
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    monkeypatch.setattr(source_patches, "HOMES", (home,))
    before = content(tree)
    assert patch(tree) == 2
    said = capsys.readouterr().err
    assert ("does not apply" if what == "context" else "made something else") in said
    assert content(tree) == before


@pytest.mark.parametrize(
    ("old", "new", "recorded", "said"),
    [
        ("\n         ", "\n         x", False, "router-stay-fp32-through-casts/core_v0.15.patch does not apply"),
        ("element_size() < 4 <=", "element_size() < 1 <=", False, "made something else of"),
        # The table goes with it, so that only what the source does can tell.
        ("element_size() < 4 <=", "element_size() < 1 <=", True, "FAILED tests/megatron/test_defects.py"),
    ],
    ids=["context", "table", "behaviour"],
)
def test_verify_fails_when_one_hunk_is_broken(old: str, new: str, recorded: bool, said: str, tmp_path: Path) -> None:
    home = tmp_path / "patches"
    shutil.copytree(ROOT / "patches", home)
    file = home / "router-stay-fp32-through-casts/core_v0.15.patch"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))

    def scripts_patches(action: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, ROOT / "scripts" / "patches", action, "0.19", "--home", home]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    if recorded:
        assert scripts_patches("record").returncode == 0
    done = scripts_patches("verify")
    assert done.returncode == 1
    assert "core_v0.19: BROKEN: " in done.stderr
    assert said in done.stderr


def test_verify_names_a_patch_that_no_series_lists(tmp_path: Path) -> None:
    home = tmp_path / "patches"
    shutil.copytree(ROOT / "patches", home)
    for series in home.glob("*.series"):
        series.write_text(series.read_text().replace("moe-padding-mask-per-token/core_v0.16.patch\n", ""))
    command = [sys.executable, ROOT / "scripts" / "patches", "verify", "0.11", "--home", home]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "moe-padding-mask-per-token/core_v0.16.patch: BROKEN: is in no series" in done.stderr
