"""A checkout of the repository, as people train from it: its own pretrain_gpt.py, with the plugin's wheel installed.

Nothing of the checkout is edited, and the variable is all that turns the plugin on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pretrain import STEPS, Run

from megatron_fp32_router.cli import main

Pretrain = Callable[..., Run]


def trained(run: Run) -> None:
    """The training was the whole program's, and it went its five steps."""
    assert f"iteration {STEPS:8d}/ {STEPS:7d}" in run.output
    assert all(rank["training"] for rank in run.ranks)


def protected(run: Run) -> None:
    """Every router of every rank is fp32, every bias is what integers make of the tokens, and status says no other."""
    assert run.dtypes("weight") == run.dtypes("expert_bias") == {"float32"}
    assert run.dtypes("local_tokens_per_expert") <= {"float64", "int64"}
    for router in (0, 1):
        assert run.biases(router) == run.exact_biases(router)
        assert len({tuple(bias) for bias in run.biases(router)}) == STEPS + 1
    for rank in run.ranks:
        assert "site-packages" in rank["plugin"]
        assert not {"drifted", "displaced", "off"} & set(rank["status"].values())
        assert {rank["status"][name] for name in ("router-casts", "gating", "bias-update")} == {"applied"}


def test_check_says_that_the_plugin_fits(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--megatron", str(tree)]) == 0, capsys.readouterr().out


def test_the_variable_alone_protects_every_router_and_a_line_of_the_log_says_so(tree: Path, pretrain: Pretrain) -> None:
    run = pretrain(True, 1)
    trained(run)
    protected(run)
    (line,) = run.said
    assert "2 routers: weight float32 x2, local_tokens_per_expert float64 x2, expert_bias float32 x2" in line
    # The class that 0.11's own training wraps with is in its tree alone; the file stays to 0.17.
    legacy = tree / "megatron" / "legacy" / "model" / "module.py"
    expected = "armed"
    if legacy.exists():
        expected = "applied" if "class Float16Module" in legacy.read_text(encoding="utf-8") else "native"
    assert run.ranks[0]["status"]["legacy-wrap-check"] == expected


def test_without_it_the_same_training_shows_the_defects(pretrain: Pretrain) -> None:
    run = pretrain(False, 1)
    trained(run)
    assert (run.said, run.ranks[0]["plugin"]) == ([], None)
    assert run.dtypes("weight") == run.dtypes("local_tokens_per_expert") == {"bfloat16"}
    assert any((counter != counted).any() for router in (0, 1) for _, counter, counted in run.steps(router))
    stuck = [run.biases(router) == [run.biases(router)[0]] * (STEPS + 1) for router in (0, 1)]
    assert stuck == [run.dtypes("expert_bias") == {"bfloat16"}] * 2  # in 0.11


@pytest.mark.on_lines("0.11", "0.19")
def test_two_ranks_with_experts_apart_and_a_distributed_optimizer_agree(pretrain: Pretrain) -> None:
    run = pretrain(True, 2, "--expert-model-parallel-size", "2", "--use-distributed-optimizer")
    trained(run)
    protected(run)
    assert "all 2 ranks on 1 host agree: 4 routers" in "\n".join(run.said)
    assert run.ranks[0]["bias"] == run.ranks[1]["bias"]
