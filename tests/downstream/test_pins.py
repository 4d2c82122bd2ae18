"""slime and Primus on the commits that they pin: one changes Megatron's source, the other replaces its router class.

Neither can be installed on a CPU; what they do to a router is done here by the facts of their sources.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bootstrap import ensure_tree

from megatron_fp32_router.cli import main

PRIMUS = "primus-2026-03-06"
FP32 = {"weight": ["float32"], "expert_bias": ["float32"], "local_tokens_per_expert": ["float64"]}

#: docker/patch/latest/megatron.patch of slime, as far as it touches a router: file, what it follows, what it adds.
SLIME = (
    (
        "router.py",
        "            self.router_replay = RouterReplay()\n",
        "        from slime.utils.routing_replay import register_routing_replay\n"
        "        register_routing_replay(self)\n",
    ),
    (
        "moe_utils.py",
        "                scores, topk, num_groups, group_topk, _compute_topk\n            )\n",
        "    from slime.utils.routing_replay import get_routing_replay_compute_topk\n"
        "    compute_topk = get_routing_replay_compute_topk(compute_topk)\n",
    ),
)


@pytest.fixture(scope="module")
def slime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of slime's pin with what slime adds to it."""
    tree = tmp_path_factory.mktemp("slime") / "Megatron-LM"
    shutil.copytree(
        ensure_tree("slime-2026-02-14") / "megatron", tree / "megatron", ignore=shutil.ignore_patterns("*.pyc")
    )
    for file, after, added in SLIME:
        path = tree / "megatron" / "core" / "transformer" / "moe" / file
        before, found, rest = path.read_text(encoding="utf-8").partition(after)
        assert found, f"{file} has changed"
        path.write_text(before + found + added + rest, encoding="utf-8")
    return tree


def test_slimes_megatron_fits_as_it_is(slime: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--for", "all", "--megatron", str(slime)]) == 0, capsys.readouterr().out
    assert "its router is that of slime" in capsys.readouterr().out


def test_slime_counts_exactly_and_replays_what_it_recorded(slime: Path, run: Callable[..., Any]) -> None:
    on = run("run_slime", slime, True, PRETENCE="cpu_program")
    seen = on.seen
    assert seen["registered"] == 2  # its addition ran
    assert seen["replayed"]
    assert seen["dtypes"] == FP32
    assert seen["bias"] == seen["exact"] != seen["started"]
    assert on.said("2 routers: weight float32 x2")
    assert on.displaced() == set()
    assert {on.state(name) for name in ("router-casts", "router-output", "gating", "bias-update")} == {"applied"}


def test_without_the_plugin_slime_counts_in_bf16(slime: Path, run: Callable[..., Any]) -> None:
    seen = run("run_slime", slime, False, PRETENCE="cpu_program").seen
    assert seen["replayed"]
    assert seen["dtypes"]["weight"] == seen["dtypes"]["local_tokens_per_expert"] == ["bfloat16"]
    assert seen["bias"] != seen["exact"]


def test_primus_own_router_class_is_protected_like_the_one_it_replaces(run: Callable[..., Any]) -> None:
    on, off = (run("run_primus", PRIMUS, plugin, PRETENCE="cpu_program") for plugin in (True, False))
    seen = on.seen
    assert seen["kinds"] == off.seen["kinds"] == ["PrimusTopKRouter"]
    assert seen["dtypes"] == FP32
    assert seen["training"]["bias"] == seen["training"]["exact"] != seen["training"]["started"]
    assert on.displaced() == set()
    assert off.seen["dtypes"]["weight"] == ["bfloat16"]
    assert off.seen["training"]["bias"] != off.seen["training"]["exact"]


def test_primus_plain_router_is_named_and_one_call_protects_it(run: Callable[..., Any]) -> None:
    on, off = (run("run_primus", PRIMUS, plugin, PRETENCE="cpu_program").seen["plain"] for plugin in (True, False))
    assert "__main__.DeepseekV4LearnedRouter" in on["refused"]
    assert "protect_router_class" in on["refused"]
    assert all(on["kept"])
    assert on["dtypes"] == on["gradients"] == ["torch.float32"]
    assert off["dtypes"] == ["torch.bfloat16"]
    assert not any(off["kept"])
