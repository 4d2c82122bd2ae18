"""`check`: says of a source tree whether the plugin is right for it, without importing it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest
from bootstrap import RELEASES, ensure_release
from checking import FINALIZE, INFO, MOE_UTILS, OFFLOAD, ROUTER, SCHEDULES, Copy, check, copier, states

from megatron_fp32_router.cli import main
from megatron_fp32_router.compat import probe
from megatron_fp32_router.patching.record import AREAS
from megatron_fp32_router.patching.records import PATCHES
from megatron_fp32_router.version import __version__


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No accepted file lies where `check` looks for one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEGATRON_FP32_ROUTER_ACCEPTED", raising=False)


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """`copy(release, file, old, new)`: see checking.py."""
    return copier(tmp_path)


@pytest.mark.parametrize("release", RELEASES)
def test_it_fits_every_release(release: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = check(capsys, "--megatron", ensure_release(release), "--pin", release)
    assert (code, report["verdict"], report["megatron"]["version"]) == (0, "fits", release)
    assert states(report) == {}
    assert len(report["targets"]) > 60
    assert report["plugin"] == __version__


# What has changed in a copy of a release --------------------------------------------------------------------------


def test_a_renamed_target_is_missing_and_its_new_name_is_suggested(copy: Copy, capsys: Any) -> None:
    tree = copy("0.19.2", ROUTER, "    def gating(self, input", "    def gating_logits(self, input")
    code, report = check(capsys, "--megatron", tree)
    assert (code, states(report)) == (1, {"gating": "missing"})
    (target,) = [t for t in report["targets"] if t["state"] == "missing"]
    assert "Router.gating_logits has its body" in target["detail"]
    assert target["patches"] == ["gating"]


def test_a_changed_signature_is_a_drift_and_the_diff_shows_it(copy: Copy, capsys: Any) -> None:
    old = "def get_updated_expert_bias(\n    tokens_per_expert,"
    text = (ensure_release("0.19.2") / MOE_UTILS).read_text(encoding="utf-8")
    old = text[text.index("def get_updated_expert_bias(") :].partition("expert_bias,")[0]
    tree = copy("0.19.2", MOE_UTILS, old, old.replace("tokens_per_expert", "tokens"))
    code, report = check(capsys, "--megatron", tree)
    assert (code, states(report)) == (1, {"get_updated_expert_bias": "drifted"})
    (target,) = [t for t in report["targets"] if t["state"] == "drifted"]
    assert "\n+def get_updated_expert_bias(tokens," in target["diff"]
    line = (tree / MOE_UTILS).read_text(encoding="utf-8").splitlines()[target["line"] - 1]
    assert "tokens" in line


def test_changed_arithmetic_in_a_callee_is_a_drift_of_the_patches_that_rely_on_it(copy: Copy, capsys: Any) -> None:
    tree = copy("0.16.1", MOE_UTILS, "grad_weight = torch.mm(grad_output", "grad_weight = -torch.mm(grad_output")
    code, report = check(capsys, "--megatron", tree)
    assert (code, states(report)) == (1, {"backward": "drifted"})
    (target,) = [t for t in report["targets"] if t["state"] == "drifted"]
    assert target["patches"] == ["gating"]
    line = (tree / MOE_UTILS).read_text(encoding="utf-8").splitlines()[target["line"] - 1]
    assert "-torch.mm(grad_output" in line


def test_comments_docstrings_annotations_and_layout_do_not_count(copy: Copy, capsys: Any) -> None:
    tree = copy("0.19.2", ROUTER, "# Convert to specified datatype", "# Something else about the datatype")
    text = (tree / ROUTER).read_text(encoding="utf-8")
    for old, new in (
        ('"""Forward pass of the router gate.', '"""Something else.'),
        (
            "def gating(self, input: torch.Tensor):",
            "def gating(\n        self, input: 'Any',\n    ) -> 'torch.Tensor':",
        ),
        ("router_dtype = input.dtype", "router_dtype: 'torch.dtype' = (input.dtype)"),
        ("if self.config.moe_router_dtype == 'fp32':", 'if self.config.moe_router_dtype == "fp32":'),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tree / ROUTER).write_text(text.replace("\n", "\r\n"), encoding="utf-8", newline="")
    code, report = check(capsys, "--megatron", tree)
    assert (code, states(report)) == (0, {})


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        # A default value, a decorator, a base class, an override that goes around the patch, a rebinding.
        (
            "padding_mask: Optional[torch.Tensor] = None):\n        logits",
            "padding_mask=0):\n        logits",
            "_forward",
        ),
        ("    @jit_fuser\n    def _apply_expert_bias(", "    def _apply_expert_bias(", "_apply_expert_bias"),
        ("class TopKRouter(Router):", "class TopKRouter(Extra, Router):", "TopKRouter"),
        ("    def set_layer_number(self", "    def _apply(self, fn): ...\n\n    def set_layer_number(self", "_apply"),
        ("class InferenceTopKRouter(", "TopKRouter.gating = faster\n\n\nclass InferenceTopKRouter(", "gating"),
    ],
)
def test_whatever_changes_behaviour_counts(old: str, new: str, expected: str, copy: Copy, capsys: Any) -> None:
    code, report = check(capsys, "--for", "all", "--megatron", copy("0.19.2", ROUTER, old, new))
    assert (code, states(report)) == (1, {expected: "drifted"})


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Router.gating: object = faster", {"gating"}),
        ("Router.gating, other = faster, 1", {"gating"}),
        ('setattr(TopKRouter, "routing", faster)', {"routing"}),
        ("setattr(TopKRouter, name(), faster)", None),
        ("del Router.gating", {"gating"}),
        ("Alias = Router; Alias.gating = faster", {"gating"}),
        ('delattr(Router, "gating")', {"gating"}),
        ("for c in (Router,): Router.gating = faster", {"gating"}),
        ("for c in (Router,): c.gating = faster", {"gating"}),
        ("for c in classes: c.gating = faster", {"gating"}),
        ("while not (Router := faster): pass", None),
        ('globals()["Router"] = faster', None),
        ("from fast import *", None),
        ("from fast import Router", None),
        ("for _ in (1,): from fast import *", None),
        # Other classes, other names, what is only read, and what only a call of it would do.
        ("Other.gating, gating = faster, Router.gating", set()),
        ('setattr(Router, "other", [c for gating in (Router, TopKRouter)])', set()),
        ("for c in (Other, Another): c.gating = faster", set()),
        ("def later(): Router.gating = faster", set()),
    ],
)
def test_rebinding_further_down_in_the_module_counts_and_its_line_is_given(
    line: str, expected: set[str] | None, copy: Copy, capsys: Any
) -> None:
    tree = copy("0.19.2")
    text = (tree / ROUTER).read_text(encoding="utf-8")
    (tree / ROUTER).write_text(f"{text}\n\n{line}\n", encoding="utf-8")
    code, report = check(capsys, "--megatron", tree)
    drifted = {t["target"].rpartition(".")[2]: t for t in report["targets"] if t["state"] == "drifted"}
    assert code == (0 if expected == set() else 1)
    assert drifted.keys() == expected if expected is not None else len(drifted) > 1
    assert {t["line"] for t in drifted.values()} <= {len(text.splitlines()) + 3}
    word = re.split(r"\W", line)[0]
    assert all(f"\n+{word}" in "\n" + t["diff"] for t in drifted.values())


def test_a_definition_under_a_condition_is_a_drift(copy: Copy, capsys: Any) -> None:
    text = (ensure_release("0.19.2") / MOE_UTILS).read_text(encoding="utf-8")
    start = text.index("def router_gating_linear(")
    function = text[start : text.index("\ndef ", start + 1)]
    under = (
        "try:\n"
        + textwrap.indent(function.strip(), "    ")
        + "\nexcept ImportError:\n    router_gating_linear = None\n"
    )
    code, report = check(capsys, "--megatron", copy("0.19.2", MOE_UTILS, function, under))
    assert (code, states(report)) == (1, {"router_gating_linear": "drifted"})
    (target,) = [t for t in report["targets"] if t["state"] == "drifted"]
    assert target["line"] > 1
    assert "except ImportError" in target["diff"]


def test_the_body_of_another_release_is_known(copy: Copy, capsys: Any) -> None:
    tree = copy("0.17.1")
    shutil.copy(ensure_release("0.18.2") / FINALIZE, tree / FINALIZE)
    code, report = check(capsys, "--megatron", tree)
    assert code == 0
    assert states(report)["_update_router_expert_bias"] == "known"
    details = {t["detail"] for t in report["targets"] if t["state"] == "known"}
    assert "as in 0.18.0 to 0.18.2" in details


def test_a_number_that_the_code_contradicts_is_said_and_decides_nothing(copy: Copy, capsys: Any) -> None:
    # 0.12's constructor casts, and 0.13's does not: the code decides what is patched.
    tree = copy("0.12.3", INFO, "MINOR = 12", "MINOR = 13")
    code, report = check(capsys, "--megatron", tree)
    assert code == 0
    assert "it calls itself 0.13.3, and more of its functions are those of 0.12" in report["notes"]
    main(["doctor", "--json", "--megatron", str(tree)])
    states_of = {patch["id"]: patch["state"] for patch in json.loads(capsys.readouterr().out)["patches"]}
    assert (states_of["router-init"], states_of["router-reset"]) == ("applied", "n/a")
    _, report = check(capsys, "--megatron", ensure_release("0.13.1"))
    assert not any("calls itself" in note or "its router is that of" in note for note in report["notes"])


def test_a_megatron_older_than_all_is_told_apart_from_a_truncated_one(copy: Copy, capsys: Any) -> None:
    tree = copy("0.11.0", INFO, "MINOR = 11", "MINOR = 10")
    (tree / ROUTER).unlink()
    code, report = check(capsys, "--megatron", tree)
    assert (code, report["verdict"]) == (1, "does not fit")
    assert report["reason"].startswith("0.10.0 is older than 0.11.0, the first that the plugin is for; update Megatron")
    # In 2022 there was a megatron/model, and no core at all.
    for name, said in (("model", "from before megatron-core"), ("data", "no Megatron; expected")):
        (tree / name / "megatron" / name).mkdir(parents=True)
        code, report = check(capsys, "--megatron", tree / name)
        assert code == 2
        assert said in report["reason"]


def test_the_code_tells_an_older_megatron_and_a_truncated_one_apart_where_the_number_does_not(
    copy: Copy, capsys: Any
) -> None:
    old = copy("0.11.0")
    text = (old / ROUTER).read_text(encoding="utf-8")
    (old / ROUTER).write_text(text.replace("expert_bias", "not_yet"), encoding="utf-8")
    code, report = check(capsys, "--megatron", old)
    assert code == 1
    assert report["reason"].startswith("it says 0.11.0, and its router has no expert_bias: it is older than 0.11.0")
    # It ends between two statements, so that Python can read it.
    cut = copy("0.16.1")
    text = (cut / ROUTER).read_text(encoding="utf-8")
    (cut / ROUTER).write_text(text[: text.index("    def _apply_aux_loss(")], encoding="utf-8")
    code, report = check(capsys, "--megatron", cut)
    assert code == 1
    (note,) = report["notes"]
    assert note.endswith("router.py ends too early: a truncated checkout? Check it out again")


def test_a_later_patch_release_with_the_same_functions_fits_and_is_said_to_be_unknown(copy: Copy, capsys: Any) -> None:
    code, report = check(capsys, "--megatron", copy("0.19.2", INFO, "PATCH = 2", "PATCH = 3"))
    assert code == 0
    assert set(states(report).values()) == {"known"}
    assert any("0.19.3 is no release that this version of the plugin knows" in note for note in report["notes"])


@pytest.mark.parametrize("minor", [15, 16])
def test_a_prerelease_may_have_or_lack_what_came_with_its_release(minor: int, copy: Copy, capsys: Any) -> None:
    release = {15: "0.15.3", 16: "0.16.0"}[minor]
    tree = copy(release)
    (tree / INFO).write_text("MAJOR = 0\nMINOR = 16\nPATCH = 0\nPRE_RELEASE = 'rc0'\n", encoding="utf-8")
    code, report = check(capsys, "--megatron", tree)
    assert report["megatron"]["version"] == "0.16.0rc0"
    assert "missing" not in states(report).values()
    assert code == 0


def test_a_commit_that_no_fingerprint_knows_is_never_called_fit(copy: Copy, capsys: Any) -> None:
    # A main of no known version, with a body of no release. Other tests have each of these alone.
    tree = copy("0.19.2", FINALIZE, "    reset_model_temporary_tensors(config, model)\n", "    later(model)\n")
    for version in ("MAJOR = 0\nMINOR = 20\nPATCH = 0\nPRE_RELEASE = 'rc0'\n", "MAJOR = 1\nMINOR = 0\nPATCH = 0\n"):
        (tree / INFO).write_text(version, encoding="utf-8")
        code, report = check(capsys, "--megatron", tree)
        assert (code, report["verdict"]) == (1, "does not fit")
        assert any("is no release that this version of the plugin knows" in note for note in report["notes"])
        # No function may be called "match", since that means a known release.
        there = {t["state"] for t in report["targets"] if t["line"]}
        assert there == {"known", "drifted"}
        (target,) = [t for t in report["targets"] if t["state"] == "drifted"]
        assert target["detail"].startswith("as in no known Megatron; nearest is that of 0.19.")
    # Without a version there is nothing to compare with.
    (tree / INFO).write_text("VERSION = 'main'\n", encoding="utf-8")
    code, report = check(capsys, "--megatron", tree)
    assert (code, report["verdict"], report["targets"]) == (2, "unknown", [])


def test_what_upstream_does_by_itself_is_native_whatever_the_number(copy: Copy, capsys: Any) -> None:
    # As on main since 2026-08-20.
    old, new = "routing_map & (~padding_mask)", "routing_map & (~padding_mask).unsqueeze(-1)"
    tree = copy("0.19.2", ROUTER, old, new)
    code, report = check(capsys, "--megatron", tree)
    assert (code, states(report)) == (0, {"_apply_expert_bias": "known"})
    assert "as in main of 2026-08-20 (723db5a727)" in {t["detail"] for t in report["targets"]}
    assert "it says 0.19.2; its router is that of main since 2026-08-20 (723db5a727)" in report["notes"]
    main(["doctor", "--json", "--megatron", str(tree)])
    (found,) = [p for p in json.loads(capsys.readouterr().out)["patches"] if p["id"] == "padding-mask"]
    assert (found["state"], found["detail"][:28]) == ("native", "needs no such patch: _apply_")


def test_what_a_job_does_not_use_does_not_stop_it(copy: Copy, capsys: Any) -> None:
    tree = copy("0.19.2", OFFLOAD, "fp32_param.data.copy_(v[", "fp32_param.data.mul_(1).copy_(v[")
    code, report = check(capsys, "--megatron", tree)
    assert (code, states(report)) == (0, {"_update_fp32_params_by_new_state": "drifted"})
    assert {name for name, word in report["areas"].items() if word != "fits"} == {"offload"}
    assert check(capsys, "--megatron", tree, "--for", "router,offload")[0] == 1
    assert check(capsys, "--megatron", tree, "--for", "router")[0] == 0
    main(["check", "--megatron", str(tree)])
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert (
        "torch_dist: fits; offload: drifted, refused when used. Not asked for: schedules, offload, layer_wise" in said
    )
    assert main(["check", "--megatron", str(tree), "--for", "router,chekpoints"]) == 2
    assert "--for chekpoints: no such area; there are router, schedules" in capsys.readouterr().err


def test_of_a_schedule_a_fact_counts_and_not_its_body(copy: Copy, capsys: Any) -> None:
    old = '        assert len(model) == 1, "non-pipeline-parallel schedule does not support model chunking"\n'
    code, report = check(capsys, "--for", "all", "--megatron", copy("0.19.2", SCHEDULES, old, f"{old}        log()\n"))
    assert (code, states(report)) == (0, {})
    tree = copy("0.19.2", SCHEDULES, old, f"{old}        config.optimizer.step()\n")
    code, report = check(capsys, "--for", "all", "--megatron", tree)
    (target,) = [t for t in report["targets"] if t["state"] == "drifted"]
    assert (code, target["target"].rpartition(".")[2]) == (1, "forward_backward_no_pipelining")
    assert target["detail"].endswith("forward_backward_no_pipelining lacks step")
    assert report["areas"]["schedules"] == "drifted, left out: slower"
    assert check(capsys, "--megatron", tree)[0] == 0


def test_every_area_has_patches_and_what_handles_optimizers_is_not_needed_by_all() -> None:
    assert {patch.area for patch in PATCHES} == set(AREAS)
    assert not [patch.id for patch in PATCHES if patch.mechanism.startswith("optimizers.") and patch.area == "router"]


def test_another_version_than_the_pinned_one_does_not_fit(capsys: Any) -> None:
    code, report = check(capsys, "--megatron", ensure_release("0.16.1"), "--pin", "0.16.0")
    assert (code, report["reason"]) == (1, "--pin asks for 0.16.0; found 0.16.1")


def test_a_commit_may_be_pinned(copy: Copy, capsys: Any) -> None:
    tree = copy("0.19.2")
    git = ["git", "-C", str(tree), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *arguments], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert check(capsys, "--megatron", tree, "--pin", commit[:9])[0] == 0
    code, report = check(capsys, "--megatron", tree, "--pin", "0123456789")
    assert (code, report["reason"]) == (1, f"--pin asks for commit 0123456789; found {commit}")


def test_a_drift_accepted_before_stays_accepted_if_the_next_probe_does_not_run_it(
    copy: Copy, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tree, file = copy("0.19.2"), tmp_path / "accepted.json"
    names = [f"megatron.core.transformer.moe.router:Router.{name}" for name in ("gating", "reset_parameters")]

    def run(root: Path, targets: Any, version: str, *further: Any, **options: Any) -> probe.Outcome:
        unproven = frozenset(t.name for t in targets if (t.state, t.name) == ("drifted", names[0]))
        return probe.Outcome([probe.Proof("casts", True, "")], unproven)

    monkeypatch.setattr(probe, "run", run)

    def accept(old: str, new: str, *options: str) -> list[str]:
        text = (tree / ROUTER).read_text(encoding="utf-8")
        assert text.count(old) == 1
        (tree / ROUTER).write_text(text.replace(old, new), encoding="utf-8")
        code, report = check(capsys, "--megatron", tree, "--accept", file, *options)
        assert code == 0
        assert not any("did not run" in note for note in report["notes"]) or options
        return list(json.loads(file.read_text(encoding="utf-8"))["targets"])

    assert accept("router_dtype = input.dtype", "router_dtype = (input + 0).dtype", "--unproven") == names[:1]
    reset = "    def reset_parameters(self):\n"
    assert sorted(accept(reset, f"{reset}        assert self.weight is not None\n")) == sorted(names)
    # A change that is no longer there is dropped.
    assert accept("router_dtype = (input + 0).dtype", "router_dtype = input.dtype") == names[1:]


def test_where_no_patch_could_be_applied_accepting_is_not_suggested(copy: Copy, capsys: Any) -> None:
    # A module that no wheel contains is compared by its parameters, without which there is no patch.
    tree = copy("0.11.0")
    legacy = tree / "megatron/legacy/model/module.py"
    legacy.parent.mkdir(parents=True)
    legacy.write_text("class Float16Module:\n    def __init__(self, args, module): ...\n", encoding="utf-8")
    assert main(["check", "--megatron", str(tree)]) == 1
    output = capsys.readouterr().out
    assert "takes (self, args, module) where (self, module, …) was expected" in re.sub(r"\s+", " ", output)
    assert "--accept" not in output
    # A changed body, which may be harmless: there it is suggested.
    other = copy("0.19.2", ROUTER, "router_dtype = input.dtype", "router_dtype = self.weight.dtype")
    assert main(["check", "--megatron", str(other)]) == 1
    assert "`check --accept` trains on this tree" in capsys.readouterr().out
    code, report = check(capsys, "--megatron", tree, "--accept", tree / "accepted.json")
    assert code == 1
    assert "not probed: megatron.legacy.model.module.Float16Module.__init__ cannot be patched" in report["notes"]
