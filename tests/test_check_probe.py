"""A Megatron whose source has changed: stopped at the import, probed, accepted, and stopped again by the next change.

One fork is made here, a full copy of a release. Its gating names a local variable differently, which is harmless.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bootstrap import ensure_release

from megatron_fp32_router.cli import main
from megatron_fp32_router.compat import probe

ROOT = Path(__file__).resolve().parent.parent
RELEASE = "0.16.1"
ROUTER = "megatron/core/transformer/moe/router.py"
HARMLESS = ("router_dtype = torch.float32", "router_dtype = torch.promote_types(torch.float32, torch.float32)")


def edit(tree: Path, file: str, old: str, new: str) -> None:
    text = (tree / file).read_text(encoding="utf-8")
    assert text.count(old) == 1
    (tree / file).write_text(text.replace(old, new), encoding="utf-8")


def fork(folder: Path, *edits: tuple[str, str]) -> Path:
    tree = folder / "fork"
    shutil.copytree(
        ensure_release(RELEASE) / "megatron", tree / "megatron", ignore=shutil.ignore_patterns("__pycache__")
    )
    for old, new in edits:
        edit(tree, ROUTER, old, new)
    return tree


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fork(tmp_path_factory.mktemp("harmless"), HARMLESS)


@pytest.fixture(scope="module")
def accepted(harmless: Path) -> Path:
    """The file that `check --accept` writes about the harmless fork."""
    file = harmless.parent / "accepted.json"
    assert main(["check", "--for", "router", "--megatron", str(harmless), "--accept", str(file)]) == 0
    return file


def check(capsys: pytest.CaptureFixture[str], tree: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["check", "--json", "--megatron", str(tree), *arguments])
    return code, json.loads(capsys.readouterr().out)


def test_the_stages_of_a_probe_are_printed_to_the_last_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with probe._shown(tmp_path / "progress"):
        (tmp_path / "progress").write_text("the first stage\nthe last stage\n", encoding="utf-8")
    said = capsys.readouterr().err
    assert said.index("the first stage …") < said.index("the last stage …")


def test_what_has_drifted_is_cleared_by_the_probe_and_recorded(
    accepted: Path, harmless: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert list(json.loads(accepted.read_text(encoding="utf-8"))["targets"]) == [
        "megatron.core.transformer.moe.router:Router.gating"
    ]
    monkeypatch.chdir(tmp_path)
    code, report = check(capsys, harmless)
    assert (code, report["verdict"]) == (1, "does not fit")
    # The default name in the current folder, and a file that the variable names.
    shutil.copy(accepted, tmp_path / "megatron_fp32_router.accepted.json")
    code, report = check(capsys, harmless)
    assert (code, report["verdict"]) == (0, "fits")
    (target,) = [t for t in report["targets"] if t["accepted"]]
    assert target["state"] == "drifted"
    assert "torch.promote_types" in target["diff"]
    (tmp_path / "megatron_fp32_router.accepted.json").unlink()
    monkeypatch.setenv("MEGATRON_FP32_ROUTER_ACCEPTED", str(accepted))
    assert check(capsys, harmless)[0] == 0


def test_the_next_change_or_another_version_of_the_plugin_ends_what_was_accepted(
    accepted: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MEGATRON_FP32_ROUTER_ACCEPTED", str(accepted))
    changed = fork(
        tmp_path, HARMLESS, ("logits = router_gating_linear(input,", "logits = 2 * router_gating_linear(input,")
    )
    assert check(capsys, changed)[0] == 1
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**json.loads(accepted.read_text(encoding="utf-8")), "plugin": "0.0.1"}))
    monkeypatch.setenv("MEGATRON_FP32_ROUTER_ACCEPTED", str(other))
    code, report = check(capsys, fork(tmp_path / "again", HARMLESS))
    assert code == 1
    assert any("was written by version 0.0.1 of the plugin" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot be read"), ("{", "is not JSON"), ("[" * 200_000, "is not JSON"), ("[]", "check --accept")],
    ids=["missing", "cut", "deep", "another"],
)
def test_an_accepted_file_that_is_none_is_bad_input(
    content: str | None, said: str, harmless: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "accepted.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    monkeypatch.setenv("MEGATRON_FP32_ROUTER_ACCEPTED", str(file))
    assert main(["check", "--megatron", str(harmless)]) == 2
    assert said in capsys.readouterr().err


def test_a_change_that_the_plugin_would_undo_fails_the_probe_and_is_not_recorded(tmp_path: Path, capsys: Any) -> None:
    # A fork that scales its logits: the plugin's own gating would silently drop that.
    tree = fork(
        tmp_path,
        ("logits = router_gating_linear(input, self.weight,", "logits = router_gating_linear(input, 2 * self.weight,"),
    )
    file = tmp_path / "accepted.json"
    code, report = check(capsys, tree, "--for", "router", "--accept", str(file))
    assert code == 1
    assert {proof["name"] for proof in report["probe"] if not proof["holds"]} == {"upstream"}
    assert not file.exists()


def test_without_the_plugin_the_probe_fails() -> None:
    outcome = probe.run(ensure_release(RELEASE), [], RELEASE, ["router"], plugin=False)
    failed = {proof.name for proof in outcome.proofs if not proof.holds}
    # A checkpoint of rounded tensors is read back as it was written.
    assert failed == {proof.name for proof in outcome.proofs} - {"checkpoint"}


def test_what_did_not_run_in_the_probe_is_not_cleared_unless_somebody_vouches_for_it(
    harmless: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "megatron.core.transformer.moe.router:Router.gating"
    outcome = probe.Outcome([probe.Proof("casts", True, "")], frozenset({name}))
    monkeypatch.setattr(probe, "run", lambda *_, **__: outcome)
    code, report = check(capsys, harmless, "--probe")
    assert code == 1
    assert any("did not run in the probe" in note for note in report["notes"])
    assert check(capsys, harmless, "--probe", "--unproven")[0] == 0


# One process for all three answers: importing Megatron is what takes the time.
PROGRAM = """
import json, os, sys
import megatron_fp32_router as plugin

try:
    import megatron.core.transformer.moe.router
except plugin.TargetChangedError as error:
    print(json.dumps(str(error)))

def states():
    import megatron.core.transformer.moe.router
    return {record.id: record.state for record in plugin.status() if record.target.partition("moe.router.")[2]}

plugin.enable(on_mismatch="warn")
print(json.dumps(states()))
plugin.disable()
os.environ["MEGATRON_FP32_ROUTER_ACCEPTED"] = sys.argv[1]
plugin.enable(on_mismatch="raise")
print(json.dumps(states()))
plugin.disable()
os.environ["MEGATRON_FP32_ROUTER_ACCEPTED"] = "nothing.json"
plugin.enable()
"""


@pytest.fixture(scope="module")
def gate(harmless: Path, accepted: Path) -> subprocess.CompletedProcess[str]:
    """The program, run on the harmless fork."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MEGATRON_FP32_ROUTER")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(accepted)],
        cwd=harmless.parent,
        env={**kept, "PYTHONPATH": os.pathsep.join([str(harmless), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_a_drifted_target_stops_the_program_at_the_import_and_says_where_and_how_to_go_on(
    gate: subprocess.CompletedProcess[str], harmless: Path
) -> None:
    message = json.loads(gate.stdout.splitlines()[0])
    lines = (harmless / ROUTER).read_text(encoding="utf-8").splitlines()
    number = next(i for i, line in enumerate(lines, start=1) if HARMLESS[1] in line)
    for part in (
        "megatron.core.transformer.moe.router.Router.gating has changed",
        f"{harmless / ROUTER}:{number}",
        "the patch 'gating' was written for it",
        "MEGATRON_FP32_ROUTER_ON_MISMATCH=warn",
    ):
        assert part in message
    assert "None" not in message


def test_a_job_that_follows_the_error_message_word_for_word_can_train(
    gate: subprocess.CompletedProcess[str], harmless: Path, tmp_path: Path
) -> None:
    message = json.loads(gate.stdout.splitlines()[0])
    command = message.partition("run `")[2].partition("`")[0]
    assert command.startswith(f"{sys.executable} -m megatron_fp32_router check ")
    name, _, file = message.partition("Then train with ")[2].partition(". Or ")[0].partition("=")
    assert not Path(file).exists()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MEGATRON_FP32_ROUTER")}
    kept["PYTHONPATH"] = os.pathsep.join([str(harmless), str(ROOT)])
    # From another folder than the one where the training stopped.
    subprocess.run(command, shell=True, cwd=tmp_path, env=kept, check=True, capture_output=True)
    program = "import megatron_fp32_router, megatron.core.transformer.moe.router; print('imported')"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=tmp_path,
        env={**kept, name: file},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "imported\n", done.stderr
    Path(file).unlink()


def test_under_warn_what_is_unprotected_is_named_once_and_nothing_is_half_protected(
    gate: subprocess.CompletedProcess[str],
) -> None:
    states = json.loads(gate.stdout.splitlines()[1])
    # Without the gating patch an fp32 weight would stop at the first product, so the patch that makes it fp32 is left
    # out too. Buffers stay protected.
    assert {name for name, state in states.items() if state == "drifted"} == {"gating", "router-reset"}
    assert states["router-output"] == states["router-casts"] == "applied"
    warnings = [line for line in gate.stderr.splitlines() if line.startswith("megatron_fp32_router: ")]
    assert len(warnings) == 2
    for warning, name in zip(warnings, ("router-reset", "gating"), strict=True):
        assert f"the patch {name!r} was written for it" in warning
        left_out = "is not patched, because its patch is unsafe without 'gating'" in warning
        assert left_out is (name != "gating")


def test_an_accepted_drift_is_patched(gate: subprocess.CompletedProcess[str]) -> None:
    states = json.loads(gate.stdout.splitlines()[2])
    assert set(states.values()) <= {"applied", "native"}
    assert states["gating"] == states["router-casts"] == "applied"


def test_an_accepted_file_that_cannot_be_read_stops_the_program(gate: subprocess.CompletedProcess[str]) -> None:
    assert gate.returncode == 1
    assert "SettingsError: the accepted file nothing.json cannot be read" in gate.stderr
