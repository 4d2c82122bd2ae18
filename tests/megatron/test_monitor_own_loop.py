"""The monitor in a loop that looks when it wants to: listening(), metrics(), and the hooks that they put on routers."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from megatron_fp32_router import lab, monitor
from megatron_fp32_router.gating.logits import score_watchers
from megatron_fp32_router.monitor import look

# What is asked here is alike on the lines in between.
pytestmark = pytest.mark.on_lines("0.11", "0.15", "0.19")

#: Small enough for many steps.
TINY: dict[str, Any] = {"hidden": 32, "heads": 2, "moe_ffn": 32, "seq_length": 32, "micro_batches": 1}


def test_a_loop_of_ones_own_gets_a_flat_dict(build: Any, expert_layers: Any, plugin: Any) -> None:
    room = build(bias_start=0.75, **TINY)
    batches = lab.text_batches(room.recipe, seed=1)
    counted: dict[str, float] = {}
    room.on_counts.append(lambda _: counted.update(monitor.metrics(room.chunks)))
    with monitor.listening(room.chunks):
        room.step(batches)
    assert all(type(value) is float for value in counted.values())
    assert counted["violations"] == 0
    assert counted[f"layer_{expert_layers[0]}/flips/actual"] == 0
    assert counted[f"layer_{expert_layers[1]}/precision/weight_bits"] == 32
    assert counted["all/load/assignments/min"] == room.recipe.tokens_per_step * room.recipe.topk
    after = monitor.metrics(room.chunks)
    assert after[f"layer_{expert_layers[0]}/bias/mean"] == pytest.approx(0.75, abs=2e-3)
    assert monitor.latest() == {}


def test_a_loop_that_looks_every_hundred_steps_gets_drift_per_step_for_each_of_its_models(
    router: Any, plugin: Any
) -> None:
    student, teacher = router(), router()
    for each, start in ((student, 0.25), (teacher, 8.0)):
        each.layer_number = 1
        each.expert_bias.data = start + torch.arange(each.expert_bias.numel()).float() / 128
    for step, bare in ((100, False), (200, False), (300, True)):
        for each in (student, teacher):
            found = monitor.metrics(each, None if bare else step)
            name = "layer_1/bias/drift_per_step"
            if step == 200:
                # 0.5 in 100 steps, whatever the other model's biases are.
                assert found[name] == pytest.approx(0.005)
                assert found["layer_1/bias/steps_to_blind_fp32"] > 0
            else:
                assert name not in found
                assert "layer_1/bias/steps_to_blind_fp32" not in found
            each.expert_bias += 0.5


def test_a_router_that_was_listened_to_can_be_let_go(router: Any, plugin: Any) -> None:
    built = router()
    with monitor.listening(built):
        assert len(score_watchers) == 1
    assert score_watchers == []
    gone = weakref.ref(built)
    del built
    gc.collect()
    assert gone() is None


def test_inside_torch_compile_the_hooks_leave_nothing_behind(router: Any, plugin: Any) -> None:
    r = router()
    tokens = torch.randn(4, 2, 64, dtype=torch.bfloat16)
    heard = look.listen({1: ("router", r)}, samples=True)[1]
    torch.compile(r, backend="eager")(tokens)
    assert heard.sample is None
    r(tokens)
    assert heard.sample is not None
    heard.remove()
