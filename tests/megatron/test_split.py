"""Split gating in a real training, emulated on a CPU; tests/test_split_products.py says what its arithmetic is."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.machinery import PathFinder
from typing import Any

import pytest
import torch

import megatron_fp32_router
from megatron_fp32_router import lab
from megatron_fp32_router.errors import SettingsError
from megatron_fp32_router.gating import choose, schedule, split, split_cache

# What is asked here is alike on the lines in between.
pytestmark = pytest.mark.on_lines("0.11", "0.16", "0.19")

SCHEDULES = "megatron.core.pipeline_parallel.schedules"


@pytest.fixture
def chosen(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "why_not", lambda device, activations, weight, dtype: "")


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The weights that have been split, one entry each time."""
    made: list[torch.Tensor] = []

    def noted(weight: torch.Tensor) -> torch.Tensor:
        made.append(weight)
        return split.split_weight(weight)

    monkeypatch.setattr(split_cache, "split_weight", noted)
    return made


@pytest.fixture
def never_stale(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Every split that the router gets is compared with one made on the spot."""
    seen: list[bool] = []
    parts_of = split_cache.parts_of

    def checked(weight: torch.Tensor, **how: bool) -> torch.Tensor:
        parts = parts_of(weight, **how)
        seen.append(torch.equal(parts, split.split_weight(weight)))
        return parts

    monkeypatch.setattr(split_cache, "parts_of", checked)
    yield seen
    assert seen
    assert all(seen)


def train(build: Callable[..., lab.Lab], steps: int = 3, **fields: Any) -> tuple[lab.Lab, list[float]]:
    room = build(**fields)
    batches = lab.text_batches(room.recipe, seed=3)
    return room, [room.step(batches) for _ in range(steps)]


@pytest.mark.parametrize("fields", [{}, {"recompute": True}, {"optimizer": "distributed", "fused_adam": True}])
def test_a_weight_is_split_once_in_a_step_and_never_stale(
    fields: dict[str, Any], build: Any, chosen: None, splits: list[Any], never_stale: list[bool]
) -> None:
    room, _ = train(build, steps=0, micro_batches=3, **fields)
    batches = lab.text_batches(room.recipe, seed=3)
    for _ in range(3):
        splits.clear()
        room.step(batches)
        assert len(splits) == len(room.routers()) == 2
        assert not schedule.running
        for _, router in room.routers():
            router.weight.data.mul_(1.25)  # as a fused kernel writes: torch keeps no record of it


def test_without_the_schedules_known_a_weight_is_split_anew_each_time(
    build: Any, chosen: None, splits: list[Any], never_stale: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    room, _ = train(build, steps=0)
    module = sys.modules[SCHEDULES]
    for name in [name for name in vars(module) if name.startswith("forward_backward_")]:
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
    room.step(lab.text_batches(room.recipe, seed=3))
    assert len(splits) == len(room.routers()) * room.recipe.micro_batches * 2  # forward and backward


def test_training_is_that_of_plain_fp32_and_the_same_bits_twice(build: Any, chosen: None, plugin: Any) -> None:
    room, once = train(build, linear_bias=False)
    weights = [router.weight.detach().clone() for _, router in room.routers()]
    room, again = train(build)
    assert once == again
    assert all(torch.equal(r.weight, w) for w, (_, r) in zip(weights, room.routers(), strict=True))
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(choose, "why_not", lambda *_: "a test")
        room, losses = train(build)
    assert losses == pytest.approx(once, abs=2e-3)
    for weight, (_, router) in zip(weights, room.routers(), strict=True):
        # Adam's first steps have the size of the learning rate, whatever the gradient: signs must agree.
        assert (router.weight - weight).abs().mean() < 2e-5


def test_a_traced_router_uses_the_split_of_its_weight_as_it_is_now(
    router: Any, chosen: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if PathFinder.find_spec("triton") is None:
        # torch is to see that there is none, and not the laboratory's stand-in.
        finders = [finder for finder in sys.meta_path if type(finder).__name__ != "_TritonStub"]
        monkeypatch.setattr(sys, "meta_path", finders)
        for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
            monkeypatch.delitem(sys.modules, name)
    built = router()
    import_module("megatron.core.transformer.module").Float16Module(built.config, built)
    x = torch.randn(32, 1, 64).bfloat16().requires_grad_()
    torch._dynamo.reset()
    compiled = torch._dynamo.optimize("aot_eager", nopython=True)(lambda hidden: built.gating(hidden))
    for _ in range(2):
        found = []
        for gate in (built.gating, compiled):
            built.weight.grad = x.grad = None
            with schedule.one_step():
                logits = gate(x)
                logits.square().sum().backward()
            found.append((logits.detach(), x.grad, built.weight.grad))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        built.weight.data.mul_(2)


def test_the_log_line_and_status_say_which_products_are_used(
    build: Any, plugin: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def detail() -> str:
        return next(record.detail for record in megatron_fp32_router.status() if record.id == "gating")

    with caplog.at_level(logging.INFO):
        assert detail() == ""
        train(build, steps=1)
        assert detail() == "plain products: cpu has no bf16 product with fp32 output"
        assert f"gating in {detail()}" in caplog.text
        monkeypatch.setattr(choose, "why_not", lambda *_: "")
        caplog.clear()
        train(build, steps=1)
        assert "gating in split bf16 products" in caplog.text
        assert detail().endswith("; split bf16 products")
    megatron_fp32_router.disable()
    megatron_fp32_router.enable()
    assert detail() == ""


def test_a_renamed_schedule_is_a_warning_because_only_speed_depends_on_it(
    release: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module(SCHEDULES)
    monkeypatch.delattr(module, "forward_backward_no_pipelining")
    try:
        with caplog.at_level(logging.WARNING):
            megatron_fp32_router.enable()
        assert "forward_backward_no_pipelining" in caplog.text
        assert "router weights are split again" in caplog.text
        states = {record.id: record.state for record in megatron_fp32_router.status()}
        assert states["step-no-pipelining"] == "drifted"
        assert states["step-interleaving"] == "applied"
    finally:
        megatron_fp32_router.disable()


@pytest.fixture
def asking(plugin: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`asking("fp32")`: the plugin, on with MEGATRON_FP32_ROUTER_PRODUCTS=fp32."""

    def ask(products: str) -> None:
        monkeypatch.setenv("MEGATRON_FP32_ROUTER_PRODUCTS", products)
        plugin()

    return ask


@pytest.mark.parametrize(("products", "split_ones"), [("auto", 0), ("split", 1), ("fp32", 0)])
def test_the_variable_says_which_products_are_used_and_all_have_fp32s_accuracy(
    products: str, split_ones: int, router: Any, asking: Any, splits: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asking(products)
    built = router(hidden=512)
    import_module("megatron.core.transformer.module").Float16Module(built.config, built)
    x = torch.randn(64, 1, 512).bfloat16().requires_grad_()
    grad = torch.randn(64, 1, 8)
    torch._dynamo.reset()
    found = []
    torch.set_float32_matmul_precision("medium")  # bf16 on this CPU, TF32 on a GPU, for everybody else's products
    try:
        for gate in (
            built.gating,
            torch._dynamo.optimize("aot_eager", nopython=True)(lambda hidden: built.gating(hidden)),
        ):
            built.weight.grad = x.grad = None
            logits = gate(x)
            logits.backward(grad)
            found.append((logits.detach(), built.weight.grad, x.grad))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(splits) == 4 * split_ones  # forward and backward, of both
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    x64, w64, g64 = x.detach().double().view(64, 512), built.weight.detach().double(), grad.double().view(64, 8)
    for got, a, b in ((found[0][0].view(64, 8), x64, w64.t()), (found[0][1], g64.t(), x64)):
        assert ((got.double() - a @ b).abs() <= 2.0**-21 * (a.abs() @ b.abs())).all()
    detail = next(record.detail for record in megatron_fp32_router.status() if record.id == "gating")
    assert (
        detail
        == {
            "auto": "plain products: cpu has no bf16 product with fp32 output",
            "split": "split bf16 products",
            "fp32": "plain products: MEGATRON_FP32_ROUTER_PRODUCTS=fp32",
        }[products]
    )


def test_fp32_is_used_also_where_products_could_be_split(router: Any, asking: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(choose, "unfit", lambda *_: "")
    weight = torch.ones(8, 8)
    for products, reason in (("auto", ""), ("split", ""), ("fp32", "MEGATRON_FP32_ROUTER_PRODUCTS=fp32")):
        asking(products)
        assert choose.why_not(weight.device, torch.bfloat16, weight, torch.float32) == reason


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"precision": "fp16"}, "activations are float16"),
        # 0.11 has no moe_router_dtype.
        pytest.param({"router_dtype": "fp64"}, "products are float64", marks=pytest.mark.since("0.12")),
    ],
)
def test_split_products_that_cannot_be_had_stop_the_program_before_the_first_step(
    fields: dict[str, Any], reason: str, build: Any, asking: Any
) -> None:
    asking("split")
    with pytest.raises(SettingsError, match=f"MEGATRON_FP32_ROUTER_PRODUCTS=split: .* {reason}"):
        build(**fields)
