"""Gating: logits, choices and gradients are those of fp32, and the rest of the model does not notice."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from programs.routers import trained, wrapped

from megatron_fp32_router import lab
from megatron_fp32_router.casts.router import COUNTER
from megatron_fp32_router.gating import logits
from megatron_fp32_router.patching.registry import replaces

# What is asked here is alike on the lines in between.
pytestmark = pytest.mark.on_lines("0.11", "0.12", "0.13", "0.15", "0.18", "0.19")


def gate_noting(saved: list[torch.Tensor], built: Any, x: torch.Tensor) -> torch.Tensor:
    """The logits of `x`; every tensor that autograd keeps for the backward is put into `saved`."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        return built.gating(x)


def dtypes_of(release: Any) -> list[str | None]:
    return [None] if release.minor == 11 else [None, "fp32", "fp64"]


def test_logits_and_gradients_are_fp32_products(router: Any, plugin: Any, release: Any, with_bias: bool) -> None:
    for router_dtype, linear_bias in itertools.product(dtypes_of(release), {False, with_bias}):
        built = wrapped(router, linear_bias=linear_bias, router_dtype=router_dtype)
        x = torch.randn(96, 2, 64).bfloat16().requires_grad_()
        saved: list[torch.Tensor] = []
        logits = gate_noting(saved, built, x)
        assert logits.dtype == (torch.float64 if router_dtype == "fp64" else torch.float32)
        assert all(t.dtype == torch.bfloat16 for t in saved if t.numel() == x.numel())
        grad = torch.randn_like(logits)
        logits.backward(grad)
        x64, w64 = x.detach().double().numpy().reshape(-1, 64), built.weight.detach().double().numpy()
        bias = getattr(built, "bias", None)
        b64 = 0.0 if bias is None else bias.detach().double().numpy()
        g64 = grad.double().numpy().reshape(-1, 8)
        tolerance = 1e-12 if router_dtype == "fp64" else 1e-5
        np.testing.assert_allclose(logits.detach().double().numpy().reshape(-1, 8), x64 @ w64.T + b64, atol=tolerance)
        assert built.weight.grad.dtype == torch.float32
        np.testing.assert_allclose(built.weight.grad.double().numpy(), g64.T @ x64, atol=1e-4)
        assert x.grad.dtype == torch.bfloat16
        if bias is not None:
            np.testing.assert_allclose(bias.grad.double().numpy(), g64.sum(0), atol=1e-4)


def test_reduced_matmul_precision_and_autocast_do_not_reach_the_logits(router: Any, plugin: Any) -> None:
    built = wrapped(router, hidden=256)
    x = torch.randn(64, 1, 256).bfloat16()
    exact = built.gating(x)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(built.gating(x), exact)
        assert torch.get_float32_matmul_precision() == "medium"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(built.gating(x), exact)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_dispatcher_sees_the_dtype_that_upstream_would_give_it(router: Any, plugin: Any, release: Any) -> None:
    for router_dtype in dtypes_of(release):
        built = wrapped(router, router_dtype=router_dtype)
        probs, routing_map = built(torch.randn(8, 1, 64).bfloat16())
        wanted = {None: torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[router_dtype]
        assert probs.dtype == wanted
        assert routing_map.dtype == torch.bool


def test_the_expert_sets_are_those_of_an_fp64_recomputation(router: Any, plugin: Any) -> None:
    built = wrapped(router)
    built.expert_bias.copy_(torch.linspace(6.9, 6.91, 8))
    x = torch.randn(512, 1, 64).bfloat16()
    _, routing_map = built(x)
    logits = x.double().numpy().reshape(-1, 64) @ built.weight.detach().double().numpy().T
    scores = 1 / (1 + np.exp(-logits)) + built.expert_bias.double().numpy()
    order = np.sort(scores, axis=1)
    clear = order[:, -2] - order[:, -3] > 1e-6  # fp32's spacing at 6.9 is 4.8e-7
    chosen = scores >= order[:, [-2]]
    assert clear.mean() > 0.99
    assert (routing_map.numpy()[clear] == chosen[clear]).all()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_does_not_lose_the_patches(backend: str, router: Any, plugin: Any) -> None:
    built = wrapped(router)
    x = torch.randn(32, 1, 64).bfloat16()
    eager = built.gating(x)
    torch._dynamo.reset()

    def gate(hidden: torch.Tensor) -> torch.Tensor:
        return built.gating(hidden)

    compiled = torch._dynamo.optimize(backend, nopython=True)(gate)
    logits = compiled(x)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, eager)
    logits.sum().backward()
    assert built.weight.grad.dtype == torch.float32


def test_a_replacement_of_a_compiled_function_is_not_skipped_by_dynamo() -> None:
    # Megatron's jit_fuser is torch.compile; what it returns carries dynamo's own attributes.
    @replaces(torch.compile(lambda x: x + 1, backend="eager"))
    def replacement(x: torch.Tensor) -> torch.Tensor:
        return x + 100

    assert torch.compile(lambda x: replacement(x), backend="eager")(torch.zeros(1)) == 100


def test_fp32_training_is_bit_identical_with_and_without_the_plugin(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import megatron_fp32_router

    losses, without = trained(build, precision="fp32")
    monkeypatch.setattr(logits, "RouterLinear", None)  # upstream's own run: on a CPU ours have the same bits
    megatron_fp32_router.enable()
    try:
        again, under = trained(build, precision="fp32")
    finally:
        megatron_fp32_router.disable()
    assert losses == again
    # What differs is a counter's own dtype, never its value.
    assert without.keys() == under.keys()
    assert all(torch.equal(without[name].double(), under[name].double()) for name in without)
    assert {name.rpartition(".")[2] for name in without if without[name].dtype != under[name].dtype} <= {COUNTER}


@pytest.mark.parametrize("fields", [{}, {"optimizer": "distributed"}, {"recompute": True}, {"precision": "fp16"}])
def test_training_learns_with_the_plugin_on(fields: dict[str, Any], build: Any, plugin: Any) -> None:
    room = build(**fields)
    batches = list(zip(range(room.recipe.micro_batches), lab.text_batches(room.recipe, seed=3), strict=False))
    first, *_, last = [room.step(batch for _, batch in batches) for _ in range(12)]
    assert last < first - 0.5
