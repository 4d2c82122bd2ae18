"""Split gating where it is meant to run: tensor cores, graphs, inductor, and the laboratory's training."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import accuracy

import megatron_fp32_router
from megatron_fp32_router import cli, lab
from megatron_fp32_router.gating import choose, schedule, split
from megatron_fp32_router.gating.linear import RouterLinear
from megatron_fp32_router.gating.matmul import mm

SHAPE = (4096, 2048, 128)


def operands(device: torch.device, case: str = "random", shape: tuple[int, int, int] = SHAPE) -> accuracy.Operands:
    return accuracy.Operands(*(t.to(device) for t in accuracy.synthetic(*shape)[case]))


def gate(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = RouterLinear.apply(x, w, None, torch.float32)
    return logits


def test_this_device_is_chosen(device: torch.device) -> None:
    assert choose.why_not(device, torch.bfloat16, torch.ones(8, 8, device=device), torch.float32) == ""


@pytest.mark.parametrize("case", ["random", "ill-conditioned", "heavy-tailed"])
def test_errors_are_at_most_one_and_a_half_times_those_of_fp32(case: str, device: torch.device) -> None:
    table = accuracy.errors(operands(device, case))
    wrong = table.pop("tokens that get other experts")
    assert wrong["split"] <= wrong["fp32"] + 2 / SHAPE[0]
    for product, ways in table.items():
        for statistic in ("mean", "max"):
            allowed = 2.0 if "before" in product and statistic == "max" else 1.5
            assert ways["split"][statistic] <= allowed * ways["fp32"][statistic], (product, statistic, ways)


def test_logits_of_integers_are_exact_also_at_the_ends_of_the_range(device: torch.device) -> None:
    random = np.random.default_rng(6)
    x, w = random.integers(-3, 4, (512, 256)), random.integers(-(2**13), 2**13, (64, 256))
    for scale in (0, -118, 100):
        weight = torch.from_numpy(w * 2.0**scale).float().to(device)
        tokens = torch.from_numpy(x).bfloat16().to(device)
        logits = split.logits(tokens, split.split_weight(weight), 64, None)
        assert (logits.double().cpu().numpy() == (x @ w.T) * 2.0**scale).all(), scale


def test_the_same_operands_give_the_same_bits(device: torch.device) -> None:
    o = operands(device)
    parts = split.split_weight(o.w)
    first = (split.logits(o.x, parts, SHAPE[2], None), *split.gradients(o.g, o.x, parts, True, True))
    for _ in range(5):
        again = (split.logits(o.x, parts, SHAPE[2], None), *split.gradients(o.g, o.x, parts, True, True))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_zero_tokens(device: torch.device) -> None:
    o = operands(device)
    x, w = o.x[:0].requires_grad_(), o.w.requires_grad_()
    gate(x, w).sum().backward()
    assert w.grad is not None
    assert not w.grad.any()


def test_no_copy_of_the_activations_in_fp32_is_ever_allocated(device: torch.device) -> None:
    o = operands(device)
    x, w = o.x.requires_grad_(), o.w.requires_grad_()
    for _ in range(2):  # workspaces come with the first call
        x.grad = w.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gate(x, w).backward(o.g)
        peak = torch.cuda.max_memory_allocated() - before
    assert peak < o.x.numel() * 4 + o.x.nbytes  # the gradient of the input itself is half of that


def test_inductor_gives_the_bits_of_eager_code(device: torch.device) -> None:
    o = operands(device)
    compiled = torch.compile(gate, fullgraph=True)
    found = []
    for function in (gate, compiled):
        x, w = o.x.clone().requires_grad_(), o.w.clone().requires_grad_()
        logits = function(x, w)
        logits.backward(o.g)
        found.append((logits.detach(), x.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def captured(step: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...]]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph, out


@pytest.mark.parametrize("whole_schedule", [False, True])
def test_a_replayed_graph_sees_the_weight_as_it_is_now(whole_schedule: bool, device: torch.device) -> None:
    o = operands(device)
    x, w = o.x.requires_grad_(), o.w.requires_grad_()

    def step() -> tuple[torch.Tensor, ...]:
        if not whole_schedule:
            logits = gate(x, w)
            return (logits, *torch.autograd.grad(logits, (x, w), o.g))
        with schedule.one_step():
            logits = gate(x, w)
            return (logits, *torch.autograd.grad(logits, (x, w), o.g))

    if whole_schedule:
        graph, out = captured(step)
    else:
        with schedule.one_step():  # a layer is captured in a step that has split the weight already
            graph, out = captured(step)
    for factor in (1.0, 1.5, 0.3):
        w.data.mul_(factor)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(out, step(), strict=True))


def test_a_training_uses_split_products_and_learns(make: Any) -> None:
    megatron_fp32_router.enable()
    try:
        room = make(lab.build)
        batches = [batch for _, batch in zip(range(2), lab.text_batches(room.recipe, seed=3), strict=False)]
        losses = [room.step(batches) for _ in range(12)]
        assert losses[-1] < losses[0] - 0.5
        details = {record.id: record.detail for record in megatron_fp32_router.status()}
        assert details["gating"] == "split bf16 products"
    finally:
        megatron_fp32_router.disable()


def test_doctor_measures_this_device_and_finds_nothing_wrong(
    capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    tree = request.config.getoption("--megatron")
    cli.main(["doctor", "--megatron", tree, "--device", "--shape", "4096x2048x128", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["device"]["graph"] == "captured"
    (row,) = found["device"]["shapes"]
    assert all(way["forward_ms"] > 0 and way["backward_ms"] > 0 for way in row["ways"].values())
    assert [f for f in found["findings"] if f["level"] == "problem" and f["about"] in ("products", "CUDA graph")] == []
    # TF32 was on for everybody: it shows where it is meant to, and nowhere else.
    errors = {name: way["errors"]["logits"]["mean"] for name, way in row["ways"].items()}
    assert errors["TF32"] > 20 * max(errors["fp32"], errors["split"])


@pytest.mark.parametrize("products", ["split", "fp32"])
def test_the_variable_says_which_products_are_used(
    products: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGATRON_FP32_ROUTER_PRODUCTS", products)
    megatron_fp32_router.enable()
    try:
        o = operands(device)
        torch.set_float32_matmul_precision("high")
        logits = gate(o.x, o.w)
        used = (
            split.logits(o.x, split.split_weight(o.w), SHAPE[2], None)
            if products == "split"
            else mm(o.x.float(), o.w.t())
        )
        assert torch.equal(logits, used)
        exact, unit = o.x.double() @ o.w.double().t(), o.x.double().abs() @ o.w.double().abs().t()
        assert ((logits.double() - exact).abs() / unit).mean() < 2e-7
    finally:
        torch.set_float32_matmul_precision("highest")
        megatron_fp32_router.disable()
