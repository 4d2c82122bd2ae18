"""The pages say what the code says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from defects import DEFECTS, state_on

from megatron_fp32_router.patching.records import PATCHES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_generated_table_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/docs", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_patch_says_what_it_is_needed_for() -> None:
    ids = {patch.id for patch in PATCHES}
    for patch in PATCHES:
        assert bool(patch.repairs) != bool(patch.goes_with), patch.id
        assert set(patch.repairs) <= DEFECTS.keys(), patch.id
        assert patch.goes_with in ids | {""}, patch.id


def test_a_patch_is_needed_native_or_has_nothing_to_patch() -> None:
    states = {patch.id: [state_on(patch, line) for line in ("0.11", "0.12", "0.13", "0.19")] for patch in PATCHES}
    assert states["router-init"] == ["needed", "needed", "native", "native"]
    assert states["router-reset"] == ["n/a", "n/a", "needed", "needed"]
    assert states["router-output"] == ["needed"] * 4
    assert states["padding-mask"] == ["n/a", "n/a", "n/a", "needed"]
    # Its function is gone.
    assert states["refuse-custom-fsdp"] == ["n/a", "needed", "needed", "n/a"]


def test_serving_says_first_whether_fp32_weights_help_and_what_to_do_for_each_pair() -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert page.splitlines()[2].startswith("**Does an fp32 router weight help with your engine at all?")
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in page.splitlines() if "|" in line]
    (vllm,) = (row for row in rows if row[0].startswith("vLLM ") and len(row) == 5)
    yes, switch, hardware, no = vllm[1:]
    assert "GLM-4.5" in yes
    assert "Ling 2.0" in switch
    assert hardware == "Nemotron-H"
    assert "DeepSeek-V3" in no

    pairs = {(name, row[1].split()[0]): row[2:] for row in rows if len(row) == 5 for name in row[0].split(", ")}
    weight, bias, advice = pairs["slime", "SGLang"]
    assert "Is rounded: Qwen3-MoE; Qwen3-Next; Kimi-Linear" in weight
    assert bias.endswith("Is rounded: Kimi-Linear")
    assert advice == "1, 2, 3, 5"
    assert pairs["Megatron's `tools/checkpoint`", "vLLM"] == ["is rounded by the sender", "is not sent", "4, 6"]
    assert ("verl to vLLM", "vLLM") in pairs
    assert ("verl to vLLM", "SGLang") not in pairs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_linked_or_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    linked = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    named = re.findall(r"`((?:docs|scripts|tests|patches|examples|megatron_fp32_router)/[\w./-]+)`", text)
    missing = [name for name in linked if not (page.parent / name).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_variable_that_is_named_exists(page: Path) -> None:
    from megatron_fp32_router.settings import VARIABLES

    named = set(re.findall(r"MEGATRON_FP32_ROUTER(?:_[A-Z]+)*", page.read_text(encoding="utf-8")))
    assert named <= {variable.name for variable in VARIABLES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_that_is_shown_is_one_that_the_program_takes(page: Path) -> None:
    from megatron_fp32_router import cli

    text = page.read_text(encoding="utf-8")
    shown = re.findall(r"(?:^|- run: |- )megatron-fp32-router ((?:check|doctor)\b[^#\n`]*)", text, re.MULTILINE)
    shown += re.findall(r"`megatron-fp32-router ((?:check|doctor)\b[^`\n]*)`", text)
    for line in shown:
        cli._parser(with_demo=False).parse_args(line.split())
    assert page.name != "check.md" or len(shown) >= 10


def test_the_pre_commit_hook_starts_the_command_and_is_the_one_in_the_recipe() -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    recipes = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "check.md").read_text(encoding="utf-8"), re.DOTALL)
    loaded = [yaml.safe_load(recipe) for recipe in recipes]
    (used,) = (recipe["repos"][0]["hooks"][0] for recipe in loaded if "repos" in recipe)
    assert used["id"] == hook["id"]
    from megatron_fp32_router import cli

    command = [*hook["entry"].split(), *used["args"]]
    assert command.pop(0) == "megatron-fp32-router"
    assert cli._parser(with_demo=False).parse_args(command).pin == "0.16.1"
