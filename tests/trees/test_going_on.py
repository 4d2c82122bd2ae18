"""A checkout's own training is saved, and goes on in a new process: the bits of one that never stopped.

Then what it wrote is looked at with the plugin's own commands, and the plugin is turned on or off between two of them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from going_on import HALF, assert_went_on, rounded
from pretrain import STEPS, TWO_RANKS, Program, Run, protected, router_dtype, trained
from saved import values
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_fp32_router.audit import open_checkpoint
from megatron_fp32_router.cli import main
from megatron_fp32_router.monitor.writers import PREFIX

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def again(pretrain: Program, on: Run) -> Run:
    """The second half of `on` in a new process, with the monitor looking at every step."""
    return pretrain("again", load=on.saved(HALF), MEGATRON_FP32_ROUTER_MONITOR="1")


def test_a_resume_ends_on_the_bits_of_a_run_that_never_stopped_whether_the_monitor_looks_or_not(
    on: Run, again: Run, off: Run
) -> None:
    assert_went_on(again, on)
    assert on.scores() == off.scores(), "with moe_router_dtype unset the dispatcher gets what upstream hands on"


def test_so_does_one_from_the_legacy_format_with_router_scores_in_fp32(pretrain: Program) -> None:
    flags = ("--ckpt-format", "torch", *router_dtype(pretrain.tree, "fp32"))
    straight = pretrain("legacy", *flags)
    assert_went_on(pretrain("legacy-again", *flags, load=straight.saved(HALF)), straight)
    assert straight.scores() == {"float32" if router_dtype(pretrain.tree, "fp32") else "bfloat16"}


def test_so_do_two_ranks_with_a_distributed_optimizer_and_router_scores_in_fp64(
    pretrain: Program, two_ranks: Run
) -> None:
    flags = (*TWO_RANKS, *router_dtype(pretrain.tree, "fp64"))
    assert_went_on(pretrain("two-ranks-again", *flags, ranks=2, load=two_ranks.saved(HALF)), two_ranks)
    assert two_ranks.scores() == {"float64" if router_dtype(pretrain.tree, "fp64") else "bfloat16"}


def test_so_do_two_ranks_from_the_legacy_format(pretrain: Program) -> None:
    flags = (*TWO_RANKS, "--ckpt-format", "torch")
    straight = pretrain("two-ranks-legacy", *flags, ranks=2)
    assert_went_on(pretrain("two-ranks-legacy-again", *flags, ranks=2, load=straight.saved(HALF)), straight)


# What it wrote -------------------------------------------------------------------------------------------------------


def test_audit_finds_the_rounding_in_a_checkpoint_from_before_and_none_in_one_of_ours(
    on: Run, off: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", str(on.folder / "saved")]) == 0, capsys.readouterr().out
    assert main(["audit", str(off.folder / "saved")]) == 1, capsys.readouterr().out


def test_the_monitor_writes_into_megatrons_own_tensorboard_file(again: Run) -> None:
    events = EventAccumulator(str(again.folder / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert "lm loss" in tags
    for name in (f"{PREFIX}/violations", f"{PREFIX}/layer_1/load/max_vio", f"{PREFIX}/layer_2/bias/spread"):
        assert [scalar.step for scalar in events.Scalars(name)] == list(range(HALF + 1, STEPS + 1)), name
    assert {scalar.value for scalar in events.Scalars(f"{PREFIX}/violations")} == {0.0}


def test_report_makes_a_page_of_what_the_monitor_wrote(again: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = again.folder / "fp32_router_monitor"
    assert main(["report", str(folder)]) == 0, capsys.readouterr().err
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("!")]
    assert (folder / "monitor.html").stat().st_size > 1000


# On and off between two processes -------------------------------------------------------------------------------------


def main_copies(checkpoint: Path) -> list[Any]:
    """Each router's weight as the optimizer has it in fp32: its main copy, or the weight itself."""
    weights = [tensor for tensor in open_checkpoint(checkpoint).tensors if tensor.kind == "weight"]
    return [(tensor.values if tensor.main is None else tensor.main).astype(float).tolist() for tensor in weights]


def moments(checkpoint: Path) -> list[Any]:
    """Each router weight's first moment."""
    found = {
        name: value.astype(float)
        for name, value in values(checkpoint).items()
        if re.search(r"exp_avg\.decoder\.layers\..*router\.weight$", name)
    }
    return [layer.tolist() for name in sorted(found) for layer in found[name].reshape(-1, *found[name].shape[-2:])]


def test_turned_on_in_a_running_project_it_goes_on_from_the_fp32_main_copies(pretrain: Program, off: Run) -> None:
    run = pretrain("off-on", load=off.saved(HALF))
    trained(run)
    protected(run)
    before = main_copies(off.saved(HALF))
    assert before != rounded(before)
    (rank,) = run.ranks
    assert rank["first"] == [main["value"] for main in rank["main"]] == before
    assert [main["exp_avg"] for main in rank["main"]] == moments(off.saved(HALF))


def test_turned_off_again_the_fp32_weights_become_main_copies(pretrain: Program, on: Run) -> None:
    run = pretrain("on-off", plugin=False, load=on.saved(HALF))
    trained(run)
    assert (run.said, run.dtypes("weight")) == ([], {"bfloat16"})
    before = main_copies(on.saved(HALF))
    (rank,) = run.ranks
    assert rank["first"] == rounded(before) != before
    assert [main["value"] for main in rank["main"]] == before
    assert [main["exp_avg"] for main in rank["main"]] == moments(on.saved(HALF))


def by_name(tree: Path) -> tuple[str, ...]:
    """What makes a distributed optimizer's checkpoint one by parameter name: a flag since 0.15, the default before."""
    sources = (tree / "megatron" / "training").rglob("*.py")
    flag = any("dist_ckpt_optim_fully_reshardable" in source.read_text(encoding="utf-8") for source in sources)
    return ("--dist-ckpt-optim-fully-reshardable",) if flag else ()


@pytest.fixture(scope="module")
def named(pretrain: Program) -> Run:
    """Two ranks without the plugin, whose state is saved by name: what their main copies are can be read there."""
    return pretrain("named", *TWO_RANKS, *by_name(pretrain.tree), plugin=False, ranks=2)


@pytest.fixture(scope="module")
def named_on(pretrain: Program, named: Run) -> Run:
    """The second half of `named`, with the plugin."""
    return pretrain("named-on", *TWO_RANKS, *by_name(pretrain.tree), ranks=2, load=named.saved(HALF))


def test_turned_on_with_a_distributed_optimizer_whose_state_was_saved_by_name(named: Run, named_on: Run) -> None:
    trained(named_on)
    protected(named_on)
    assert [rank["first"] for rank in named_on.ranks] == [main_copies(named.saved(HALF))] * 2


def test_turned_on_with_one_whose_state_was_saved_by_buffer_which_is_the_default(
    pretrain: Program, named: Run, named_on: Run
) -> None:
    if not by_name(pretrain.tree):  # its default is by name
        return
    without = pretrain("by-buffer", *TWO_RANKS, plugin=False, ranks=2)
    assert [rank["losses"] for rank in without.ranks] == [rank["losses"] for rank in named.ranks]
    run = pretrain("by-buffer-on", *TWO_RANKS, ranks=2, load=without.saved(HALF))
    trained(run)
    protected(run)
    before = main_copies(named.saved(HALF))
    assert [rank["first"] for rank in run.ranks] == [before] * 2
    assert before != rounded(before)
    # The rest goes on too: as from state that is stored by name.
    assert [rank["losses"] for rank in run.ranks] == [rank["losses"] for rank in named_on.ranks]


def test_turned_off_from_a_checkpoint_that_megatrons_converter_has_saved_with_weights_left_to_it(
    pretrain: Program, two_ranks: Run
) -> None:
    flags = (*TWO_RANKS, *router_dtype(pretrain.tree, "fp64"))
    home = pretrain.folder / "converted"
    convert = ("--ckpt-convert-format", "torch_dist", "--ckpt-convert-save", str(home))
    setting = {"MEGATRON_FP32_ROUTER_PROTECT": "buffers"}
    source = two_ranks.saved(HALF)
    files = {path: path.read_bytes() for path in sorted(source.rglob("*")) if path.is_file()}
    done = pretrain.start("convert", *flags, *convert, plugin=True, ranks=2, load=source, **setting)
    assert done.returncode == 0, done.stdout
    assert "iteration        " not in done.stdout, "it takes no step"
    assert {path: path.read_bytes() for path in sorted(source.rglob("*")) if path.is_file()} == files
    run = pretrain("converted-off", *flags, plugin=False, ranks=2, load=home / "torch_dist" / source.name)
    trained(run)
    assert (run.said, run.dtypes("weight")) == ([], {"bfloat16"})
    before = main_copies(source)
    assert [rank["first"] for rank in run.ranks] == [rounded(before)] * 2 != [before] * 2
