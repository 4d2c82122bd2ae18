"""The monitor inside one real training process: what it sees, and what it leaves alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import megatron_fp32_router
from megatron_fp32_router import lab
from megatron_fp32_router.balance import update
from megatron_fp32_router.gating.logits import score_watchers
from megatron_fp32_router.monitor import look, precision

# What is asked here is alike on the lines in between.
pytestmark = pytest.mark.on_lines("0.11", "0.15", "0.19")

#: Small enough for many steps.
TINY: dict[str, Any] = {"hidden": 32, "heads": 2, "moe_ffn": 32, "seq_length": 32, "micro_batches": 1}

PATCHES = ("monitor-step", "monitor-optimizer")


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`watched(N)` turns the plugin on with a look every N steps; the file it writes."""

    def on(interval: int, **settings: Any) -> Path:
        monkeypatch.setenv("MEGATRON_FP32_ROUTER_MONITOR", str(interval))
        monkeypatch.setenv("MEGATRON_FP32_ROUTER_MONITOR_DIR", str(tmp_path))
        megatron_fp32_router.disable()
        megatron_fp32_router.enable(**settings)
        return tmp_path / "monitor.jsonl"

    yield on
    megatron_fp32_router.disable()


def looks(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def finalize() -> Any:
    return import_module("megatron.core.distributed.finalize_model_grads")


class Operations(TorchDispatchMode):
    """Every operation of torch, and waits for the device among them, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operations(room: lab.Lab, batches: Any) -> list[str]:
    """What one step does between its last backward and its optimizer."""
    real, seen = room.config.finalize_model_grads_func, Operations()

    def watched(*args: Any, **kwargs: Any) -> None:
        with seen:
            real(*args, **kwargs)

    room.config.finalize_model_grads_func = watched
    room.step(batches)
    room.config.finalize_model_grads_func = real
    return seen.names


def test_steps_without_a_look_run_exactly_the_operations_that_they_run_with_the_monitor_off(
    build: Any, expert_layers: Any, plugin: Any, watched: Any
) -> None:
    original = finalize()._allreduce_conditional_embedding_grads
    room = build(**TINY)
    batches = lab.text_batches(room.recipe, seed=1)
    room.step(batches)
    expected = operations(room, batches)
    assert not {status.id for status in megatron_fp32_router.status()} & set(PATCHES)
    assert update.watchers == []

    file = watched(4)
    states = {status.id: status.state for status in megatron_fp32_router.status()}
    assert [states[name] for name in PATCHES] == ["applied", "applied"]
    room = build(**TINY)
    batches = lab.text_batches(room.recipe, seed=1)
    for step in range(1, 7):
        hooks = [len(router._forward_hooks) for _, router in room.routers()]
        assert hooks == ([1, 1] if step == 4 else [0, 0])
        done = operations(room, batches)
        if step == 4:
            assert len(done) > len(expected)
        elif step > 1:  # DDP does something else in the first
            assert done == expected
        assert file.exists() == (step >= 4)
    assert [record["layer"] for record in looks(file)] == [*expert_layers, "all"]
    assert [record["metrics"]["update/gain"] for record in looks(file)[:2]] == pytest.approx([1, 1], rel=1e-3)
    about = looks(file)[-1]["about"]
    assert about["megatron"] == f"Megatron-Core {lab.megatron_version()}"
    assert (about["plugin"], about["settings"]["monitor"]) == (megatron_fp32_router.__version__, 4)
    assert update.watchers == []
    megatron_fp32_router.disable()
    assert finalize()._allreduce_conditional_embedding_grads is original


CASTS = {
    "assignment to .data": lambda router: setattr(router.weight, "data", router.weight.data.bfloat16()),
    "a third party's _apply": lambda router: torch.nn.Module._apply(router, lambda t: t.bfloat16()),
    "a buffer": lambda router: setattr(router, "expert_bias", router.expert_bias.bfloat16()),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_a_cast_in_the_middle_of_a_run_stops_it_at_the_next_look(
    cast: Any, build: Any, expert_layers: Any, watched: Any
) -> None:
    file = watched(2)
    room = build(**TINY)
    batches = lab.text_batches(room.recipe, seed=1)
    for _ in range(3):
        room.step(batches)
    name, router = room.routers()[1]
    # After the forward, whose gating would notice, and where nothing but the monitor looks before the optimizer.
    room.on_counts.append(lambda _: cast(router))
    with pytest.raises(megatron_fp32_router.UnprotectedRouterError) as raised:
        room.step(batches)
    assert f"layer {expert_layers[1]}, {name}: " in str(raised.value)
    assert "; it was float32 2 steps before" in str(raised.value)
    assert looks(file)[-1]["step"] == 4
    assert any(f"layer {expert_layers[1]}" in text for text in looks(file)[-1]["violations"])


def _narrow_gradient(router: Any) -> None:
    router.weight.main_grad = router.weight.main_grad.bfloat16()


def _narrow_moment(router: Any) -> None:
    """In the optimizer's state, wherever it keeps that of this weight."""
    narrowed = 0
    for optimizer in list(precision._optimizers):
        for parameter, state in getattr(getattr(optimizer, "optimizer", None), "state", {}).items():
            if parameter.numel() == router.weight.numel() and "exp_avg" in state:
                state["exp_avg"] = state["exp_avg"].bfloat16()
                narrowed += 1
    assert narrowed


def test_a_buffer_that_is_cast_stops_the_run_where_only_buffers_are_protected(build: Any, watched: Any) -> None:
    watched(1, protect="buffers")
    room = build(**TINY)
    room.on_counts.append(lambda _: CASTS["a buffer"](room.routers()[0][1]))
    with pytest.raises(megatron_fp32_router.UnprotectedRouterError, match="expert_bias is bfloat16"):
        room.step(lab.text_batches(room.recipe, seed=1))


@pytest.mark.parametrize(
    ("narrow", "what", "optimizer"),
    [
        (_narrow_gradient, "weight_grad", "plain"),
        (_narrow_moment, "weight_exp_avg", "plain"),
        (_narrow_moment, "weight_exp_avg", "distributed"),
    ],
    ids=["gradient", "moment", "moment of a shard"],
)
def test_a_gradient_or_moment_below_fp32_stops_the_run_by_its_name(
    narrow: Any, what: str, optimizer: str, build: Any, expert_layers: Any, watched: Any
) -> None:
    file = watched(2)
    room = build(optimizer=optimizer, **TINY)
    batches = lab.text_batches(room.recipe, seed=1)
    for _ in range(3):
        room.step(batches)
    assert looks(file)[-1]["violations"] == []
    assert looks(file)[-2]["metrics"][f"precision/{what}_bits"] == 32
    name, router = room.routers()[1]
    room.on_counts.append(lambda _: narrow(router))
    with pytest.raises(megatron_fp32_router.UnprotectedRouterError) as raised:
        room.step(batches)
    assert f"layer {expert_layers[1]}, {name}: {what} is bfloat16; it was float32 2 steps before" in str(raised.value)


def test_scores_below_fp32_stop_the_run_by_their_name(
    build: Any, expert_layers: Any, watched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = watched(2)
    room = build(**TINY)
    batches = lab.text_batches(room.recipe, seed=1)
    for _ in range(2):
        room.step(batches)
    assert [record["metrics"]["precision/scores_bits"] for record in looks(file)[:-1]] == [32, 32]
    assert score_watchers == []
    name, router = room.routers()[1]
    routing = router.routing

    def rounding(*args: Any, **kwargs: Any) -> Any:
        scores, *rest = routing(*args, **kwargs)
        return (scores.bfloat16(), *rest)

    monkeypatch.setattr(router, "routing", rounding, raising=False)
    room.step(batches)
    with pytest.raises(megatron_fp32_router.UnprotectedRouterError) as raised:
        room.step(batches)
    assert f"layer {expert_layers[1]}, {name}: scores is bfloat16; it was float32 2 steps before" in str(raised.value)
    assert f"layer {expert_layers[0]}" not in str(raised.value)


def test_turned_off_one_step_ahead_of_a_look_the_monitor_leaves_no_hook_behind(build: Any, watched: Any) -> None:
    watched(2)
    room = build(**TINY)
    room.step(lab.text_batches(room.recipe, seed=1))
    assert [len(router._forward_hooks) for _, router in room.routers()] == [1, 1]
    megatron_fp32_router.disable()
    assert [len(router._forward_hooks) for _, router in room.routers()] == [0, 0]
    assert update.watchers == score_watchers == []


def test_under_warn_a_cast_is_written_down_and_the_training_goes_on(
    build: Any, expert_layers: Any, watched: Any, caplog: pytest.LogCaptureFixture
) -> None:
    file = watched(1, on_mismatch="warn")
    room = build(**TINY)
    batches = lab.text_batches(room.recipe, seed=1)
    room.step(batches)
    name, router = room.routers()[0]
    room.on_counts.append(lambda _: CASTS["a buffer"](router))
    for _ in range(2):
        room.step(batches)
    _, first, second = (record["violations"] for record in looks(file)[2::3])
    assert first == [f"layer {expert_layers[0]}: {name}: expert_bias is bfloat16; it was float32 1 step before"]
    assert second == [f"layer {expert_layers[0]}: {name}: expert_bias is bfloat16"]
    assert "no longer in fp32" in caplog.text


def test_a_third_partys_balance_update_is_judged_one_step_later(
    build: Any, watched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = watched(2)
    room = build(bias_start=0.75, **TINY)
    seen: list[int] = []

    def update_by_half(model: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        for _, router in room.routers():
            counts = router.local_tokens_per_expert
            seen.append(int(counts.sum()))
            router.expert_bias += torch.sign(counts.mean() - counts).float() * 5e-4
            counts.zero_()

    monkeypatch.setattr(finalize(), "_update_router_expert_bias", update_by_half)
    batches = lab.text_batches(room.recipe, seed=1)
    for _ in range(2):
        room.step(batches)
    assert not file.exists()
    room.step(batches)
    first = looks(file)[0]
    assert first["step"] == 2
    assert first["metrics"]["load/assignments"] == seen[0]
    assert first["metrics"]["update/gain"] == pytest.approx(0.5, rel=1e-3)
    assert update.watchers == []


def test_where_every_step_is_a_look_every_look_has_tokens(build: Any, watched: Any) -> None:
    file = watched(1)
    room = build(**TINY)
    batches = lab.text_batches(room.recipe, seed=1)
    for _ in range(3):
        room.step(batches)
    # Hooks go on one step ahead: the very first look has none.
    with_tokens = [(record["step"], "flips/actual" in record["metrics"]) for record in looks(file)[::3]]
    assert with_tokens == [(1, False), (2, True), (3, True)]


def test_a_monitor_that_has_failed_leaves_no_hook_behind(
    build: Any, watched: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = watched(1)
    room = build(**TINY)
    batches = lab.text_batches(room.recipe, seed=1)
    room.step(batches)
    # After the balance update, when the hooks of the next look are on.
    monkeypatch.setattr(look, "read", lambda seen: 1 / 0)
    for _ in range(2):
        room.step(batches)
    assert caplog.text.count("the monitor has ended, and the training goes on without it: on rank 0 it failed") == 1
    assert [len(router._forward_hooks) for _, router in room.routers()] == [0, 0]
    assert update.watchers == score_watchers == []
    assert {record["step"] for record in looks(file)} == {1}


def test_a_bias_that_is_frozen_has_swallowed_nothing(build: Any, watched: Any) -> None:
    file = watched(1)
    room = build(**TINY)
    room.routers()[1][1].frozen_expert_bias = True  # releases before 0.19 do not know this and update all the same
    room.step(lab.text_batches(room.recipe, seed=1))
    for record in looks(file):
        assert record["metrics"].get("update/swallowed", 0) == 0
        assert record["metrics"].get("load/assignments", 1) > 0


@pytest.mark.parametrize("optimizer", ["plain", "distributed"])
def test_where_only_buffers_are_protected_a_bf16_weight_breaks_no_promise(
    optimizer: str, build: Any, watched: Any
) -> None:
    file = watched(1, protect="buffers")
    room = build(optimizer=optimizer, **TINY)
    room.step(lab.text_batches(room.recipe, seed=1))
    for record in looks(file)[:2]:
        assert record["violations"] == []
        bits = {name: record["metrics"][f"precision/{name}_bits"] for name in ("weight", "expert_bias", "weight_main")}
        assert bits == {"weight": 16, "expert_bias": 32, "weight_main": 32}
        assert record["metrics"]["precision/arithmetic_bits"] == 24


def test_the_probe_tells_fp32_from_tf32_from_bf16(router: Any, plugin: Any) -> None:
    from megatron_fp32_router.monitor.precision import bits_of, probe
    from megatron_fp32_router.monitor.stability import tf32

    r = router()

    def bits() -> float:
        dtype, error = probe(r, torch.bfloat16)  # type: ignore[misc]
        return bits_of(error.item(), dtype)

    assert bits() == 24
    r.gating = lambda input: input.float() @ tf32(r.weight).t()
    assert bits() == pytest.approx(11, abs=0.1)
    r.gating = lambda input: input @ r.weight.bfloat16().t()
    assert bits() == pytest.approx(8, abs=0.1)


def test_a_restart_goes_on_in_the_same_file_and_a_line_that_was_cut_off_harms_no_other(
    build: Any, watched: Any
) -> None:
    for _ in range(2):
        file = watched(2)
        room = build(**TINY)
        batches = lab.text_batches(room.recipe, seed=1)
        for _ in range(2):
            room.step(batches)
        with file.open("a") as stream:
            stream.write('{"step": 3, "lay')
    from megatron_fp32_router.monitor import runs

    run = runs.read(file)
    assert run.steps == [2, 4]
    assert run.notes == ["2 lines of the file are cut off and left out"]
