"""A checkout of the repository, as people train from it: its own pretrain_gpt.py, with the plugin's wheel installed.

Nothing of the checkout is edited, and the variable is all that turns the plugin on.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from pretrain import STEPS, Run, protected, trained

from megatron_fp32_router.cli import main


def test_check_says_that_the_plugin_fits(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--megatron", str(tree)]) == 0, capsys.readouterr().out


def test_the_variable_alone_protects_every_router_and_a_line_of_the_log_says_so(tree: Path, on: Run) -> None:
    trained(on)
    protected(on)
    (line,) = on.said
    assert "2 routers: weight float32 x2, local_tokens_per_expert float64 x2, expert_bias float32 x2" in line
    # The class that 0.11's own training wraps with is in its tree alone; the file stays to 0.17.
    legacy = tree / "megatron" / "legacy" / "model" / "module.py"
    expected = "armed"
    if legacy.exists():
        expected = "applied" if "class Float16Module" in legacy.read_text(encoding="utf-8") else "native"
    assert on.ranks[0]["status"]["legacy-wrap-check"] == expected


def test_without_it_the_same_training_shows_the_defects(off: Run) -> None:
    trained(off)
    assert (off.said, off.ranks[0]["plugin"]) == ([], None)
    assert off.dtypes("weight") == off.dtypes("local_tokens_per_expert") == {"bfloat16"}
    assert any((counter != counted).any() for router in (0, 1) for _, counter, counted in off.steps(router))
    stuck = [off.biases(router) == [off.biases(router)[0]] * (STEPS + 1) for router in (0, 1)]
    assert stuck == [off.dtypes("expert_bias") == {"bfloat16"}] * 2  # in 0.11


@pytest.mark.whole
def test_two_ranks_with_experts_apart_and_a_distributed_optimizer_agree(two_ranks: Run) -> None:
    trained(two_ranks)
    protected(two_ranks)
    assert "all 2 ranks on 1 host agree: 4 routers" in "\n".join(two_ranks.said)
    assert two_ranks.ranks[0]["bias"] == two_ranks.ranks[1]["bias"]
