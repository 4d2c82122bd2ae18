"""D15 and D22: what upstream's router does with TransformerEngine's kernels, with the plugin off and on."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from packaging.version import Version

import megatron_fp32_router
from megatron_fp32_router import lab


@pytest.fixture(autouse=True)
def engine() -> Version:
    """TransformerEngine's version."""
    found = pytest.importorskip("transformer_engine", reason="TransformerEngine is not installed: D15, D22 DID NOT RUN")
    import_module("transformer_engine.pytorch")
    return Version(found.__version__)


@pytest.fixture
def plugin() -> Iterator[None]:
    megatron_fp32_router.enable()
    yield
    megatron_fp32_router.disable()


def wrapped(make: Any, **fields: Any) -> Any:
    built = make(lab.make_router, hidden=1024, experts=64, topk=8, router_dtype="fp32", **fields)
    import_module("megatron.core.transformer.module").Float16Module(built.config, built)
    return built


def error_of_the_weights_gradient(make: Any, device: torch.device) -> float:
    """Mean error of the weight's gradient in one backward, relative to the sum of the absolute terms.

    Upstream rounds that gradient to the weight's bf16 afterwards (D14), so it is taken where the GEMM returns it.
    """
    built = wrapped(make)
    x = torch.randn(4096, 1, 1024, device=device).bfloat16()
    grad = torch.randn(4096, 1, 64, device=device)
    moe_utils = import_module("megatron.core.transformer.moe.moe_utils")
    returned: list[torch.Tensor] = []
    gemm = moe_utils.te_general_gemm

    def noted(*args: Any, **kwargs: Any) -> Any:
        result = gemm(*args, **kwargs)
        returned.append(result[0])
        return result

    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(moe_utils, "te_general_gemm", noted)
        built.gating(x).backward(grad)
    found = next((t for t in returned if t.shape == built.weight.shape), built.weight.grad)
    assert found.dtype == torch.float32
    g, t = grad.double().reshape(-1, 64), x.double().reshape(-1, 1024)
    return float(((found.double() - g.t() @ t).abs() / (g.abs().t() @ t.abs())).mean())


def test_d15_the_backward_is_tf32_without_the_plugin(make: Any, device: torch.device) -> None:
    if Version(import_module("megatron.core").__version__) < Version("0.13"):
        pytest.skip("the release multiplies without TransformerEngine")
    assert error_of_the_weights_gradient(make, device) > 1e-6


def test_d15_is_gone_with_the_plugin(make: Any, device: torch.device, plugin: None) -> None:
    assert error_of_the_weights_gradient(make, device) < 1e-7


def fused(make: Any) -> Any:
    built = wrapped(make, extra={"moe_router_fusion": True})
    built.expert_bias.fill_(6.9)
    return built


def test_d22_the_fused_router_refuses_a_rounded_bias_without_the_plugin(
    make: Any, device: torch.device, engine: Version
) -> None:
    if engine < Version("2.13"):
        pytest.skip(f"TransformerEngine {engine} takes any dtype; 2.13 does not")
    built = fused(make)
    assert built.expert_bias.dtype == torch.bfloat16
    with pytest.raises(RuntimeError):
        built.routing(torch.randn(512, 1, 64, device=device))


def test_d22_the_fused_router_takes_the_bias_with_the_plugin(make: Any, device: torch.device, plugin: None) -> None:
    built = fused(make)
    built.expert_bias.add_(torch.linspace(0, 0.01, 64, device=device))
    logits = torch.randn(512, 1, 64, device=device)
    _, routing_map = built.routing(logits)
    scores = torch.sigmoid(logits.double().reshape(-1, 64)) + built.expert_bias.double()
    order = scores.sort(dim=1).values
    clear = order[:, -8] - order[:, -9] > 1e-5
    assert torch.equal(routing_map.bool()[clear], (scores >= order[:, [-8]])[clear])
