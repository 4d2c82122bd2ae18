"""Split gating: exact parts, fp32's class of accuracy, and the range of fp32; on a CPU, where it is emulated.

The code that runs on CUDA is the same but for two products (split.to_fp32, split._to_bf16); on the meta device their
real calls are made, with shapes and dtypes only. tests/gpu runs them for real.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from benchmarks import accuracy
from bootstrap import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_fp32_router.gating import choose, eager, split
from megatron_fp32_router.gating.matmul import mm, true_fp32

LARGEST = float(torch.finfo(torch.bfloat16).max)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split products wherever their dtypes allow, on whatever device."""
    monkeypatch.setattr(choose, "why_not", lambda device, activations, weight, dtype: "")


def sum_of_parts(weight: torch.Tensor) -> np.ndarray:
    parts = split.split_weight(weight)
    assert parts.dtype == torch.bfloat16
    return parts.double().numpy().reshape(3, *weight.shape).sum(axis=0)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=8, max_size=8))
def test_three_parts_add_up_to_the_weight_exactly_or_within_what_bf16_can_hold(values: list[float]) -> None:
    weight = np.array([values], dtype=np.float32)
    lost = np.abs(sum_of_parts(torch.from_numpy(weight)) - weight.astype(np.float64))
    exact = (weight == 0) | (np.abs(weight) >= 2.0**-110)
    assert (lost[exact] == 0).all()
    assert (lost <= 2.0**-134).all()


def test_every_last_bit_of_every_exponent_is_kept() -> None:
    exponents = np.arange(-110, 128, dtype=np.float64)[:, None]
    significands = np.array([1, 1 + 2.0**-23, 2 - 2.0**-23, 1.5 + 2.0**-8, 1 + 2.0**-8 + 2.0**-16 + 2.0**-23])
    weight = (significands * 2.0**exponents).astype(np.float32)
    assert weight.max() > LARGEST  # where rounding to bf16 gives infinity
    assert (sum_of_parts(torch.from_numpy(weight)) == weight.astype(np.float64)).all()


def operands(tokens: int = 48, hidden: int = 64, experts: int = 16) -> accuracy.Operands:
    return accuracy.synthetic(tokens, hidden, experts)["random"]


def products(o: accuracy.Operands) -> tuple[torch.Tensor, ...]:
    parts = split.split_weight(o.w)
    return (split.logits(o.x, parts, o.w.shape[0], None), *split.gradients(o.g, o.x, parts, True, True))


@pytest.mark.parametrize("case", ["random", "ill-conditioned", "heavy-tailed"])
def test_errors_are_at_most_one_and_a_half_times_those_of_fp32(case: str) -> None:
    table = accuracy.errors(accuracy.synthetic()[case])
    wrong = table.pop("tokens that get other experts")
    assert wrong["split"] <= wrong["fp32"] + 2 / 1024
    assert wrong["bf16"] > 0.005
    for product, ways in table.items():
        for statistic in ("mean", "max"):
            # What nobody is handed, but for the rounding to bf16: the terms left out are half a unit each.
            allowed = 2.0 if "before" in product and statistic == "max" else 1.5
            assert ways["split"][statistic] <= allowed * ways["fp32"][statistic], (product, statistic, ways)
        if product in ("logits", "gradient of the weight"):
            assert ways["TF32"]["mean"] > 100 * ways["split"]["mean"]


def test_a_weight_of_single_bits_gives_the_logits_that_integers_give() -> None:
    # All sums are below 2^24: fp32 is exact, whatever the order; bf16 and TF32 are not.
    random = np.random.default_rng(6)
    x = random.integers(-3, 4, (32, 64))
    w = random.integers(-(2**15), 2**15, (8, 64))
    logits = split.logits(
        torch.from_numpy(x).bfloat16(), split.split_weight(torch.from_numpy(w).float()), 8, torch.arange(8.0)
    )
    assert (logits.numpy() == x @ w.T + np.arange(8)).all()


def test_the_gradients_are_those_that_integers_give() -> None:
    random = np.random.default_rng(6)
    x, w = random.integers(-3, 4, (32, 64)), random.integers(-(2**11), 2**11, (8, 64))
    g = random.integers(-(2**11), 2**11, (32, 8))
    parts = split.split_weight(torch.from_numpy(w).float())
    grad_input, grad_weight = split.gradients(
        torch.from_numpy(g).float(), torch.from_numpy(x).bfloat16(), parts, True, True
    )
    assert grad_weight is not None
    assert (grad_weight.numpy() == g.T @ x).all()
    # 2^11 numbers have no lo; sums of 8 products are below 2^25, so that at most one rounding comes before bf16's.
    assert torch.equal(grad_input, torch.from_numpy((g @ w).astype(np.float32)).bfloat16())


def test_weights_at_the_ends_of_the_range_give_what_fp32_gives() -> None:
    x = torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.bfloat16)
    top = float(torch.finfo(torch.float32).max)
    weight = torch.tensor(
        [
            [top, -top, 0.0],
            [(LARGEST + top) / 2, 0.0, 0.0],
            [2.0**-120 * (1 + 2.0**-23), 0.0, 0.0],
            [2.0**-149, 2.0**-140, 1.0],
        ]
    )
    logits = split.logits(x, split.split_weight(weight), 4, None)
    fp64 = x.double() @ weight.double().t()
    lost = (logits.double() - fp64).abs()[0]
    assert lost[0] == lost[1] == 0
    assert (lost[2:] <= 2 * 2.0**-134).all()


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("where", [0, 1, 2], ids=["x", "w", "g"])
def test_what_is_not_finite_does_not_become_finite_and_touches_nothing_else(where: int, value: float) -> None:
    o = operands()
    o[where][3, 5] = value
    wide = [t.double() for t in o]
    logits, grad_input, grad_weight = products(o)
    for got, exact in (
        (logits, wide[0] @ wide[1].t()),
        (grad_input, wide[2] @ wide[1]),
        (grad_weight, wide[2].t() @ wide[0]),
    ):
        assert torch.equal(got.isfinite(), exact.isfinite())


def test_zero_tokens_give_empty_logits_and_zero_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    o = operands()
    # No product is asked what it makes of empty matrices.
    monkeypatch.setattr(split, "to_fp32", None)
    monkeypatch.setattr(split, "_to_bf16", None)
    parts = split.split_weight(o.w)
    assert split.logits(o.x[:0], parts, 16, torch.ones(16)).shape == (0, 16)
    grad_input, grad_weight = split.gradients(o.g[:0], o.x[:0], parts, True, True)
    assert grad_input is not None
    assert grad_weight is not None
    assert (grad_input.shape, grad_input.dtype) == ((0, 64), torch.bfloat16)
    assert grad_weight.shape == (16, 64)
    assert not grad_weight.any()
    assert split.gradients(o.g[:0], o.x[:0], parts, False, False) == (None, None)


def test_the_same_operands_give_the_same_bits_and_each_gradient_comes_alone_too() -> None:
    o = operands()
    once, again = products(o), products(o)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    parts = split.split_weight(o.w)
    only_input, none = split.gradients(o.g, o.x, parts, True, False)
    assert none is None
    assert torch.equal(only_input, once[1])
    none, only_weight = split.gradients(o.g, o.x, parts, False, True)
    assert none is None
    assert torch.equal(only_weight, once[2])


def test_a_bf16_weight_as_under_protect_buffers_is_one_exact_part(chosen: None) -> None:
    o = operands()
    weight = o.w.bfloat16()
    assert split.split_weight(weight).data_ptr() == weight.data_ptr()
    grad_input, grad_weight = eager.gradients(o.g, o.x, weight, True, True)
    logits = eager.logits(o.x, weight, None, torch.float32)
    assert torch.equal(logits, o.x.float() @ weight.float().t())
    assert grad_weight is not None
    assert grad_weight.dtype == torch.bfloat16
    assert torch.equal(grad_weight, products(o)[2].bfloat16())
    exact = o.g.double() @ weight.double()
    assert (grad_input.double() - exact).abs().max() <= exact.abs().max() * 2.0**-8


class Shapes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.wide: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append(str(func))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.wide.append(tuple(out.shape))
        return out


def test_on_an_accelerator_no_activation_is_held_in_fp32_and_the_activations_are_read_once(chosen: None) -> None:
    tokens, hidden, experts = 1024, 512, 16
    x = torch.empty(tokens, hidden, dtype=torch.bfloat16, device="meta")
    w = torch.empty(experts, hidden, device="meta")
    with Shapes() as forward:
        logits = eager.logits(x, w, None, torch.float32)
    with Shapes() as backward:
        grad_input, grad_weight = eager.gradients(torch.empty_like(logits), x, w, True, True)
    assert (logits.shape, logits.dtype) == ((tokens, experts), torch.float32)
    assert grad_input is not None
    assert grad_weight is not None
    assert (grad_input.shape, grad_input.dtype) == (x.shape, torch.bfloat16)
    assert (grad_weight.shape, grad_weight.dtype) == (w.shape, torch.float32)
    assert forward.calls.count("aten.mm.dtype") == 1
    assert backward.calls.count("aten.mm.dtype") == backward.calls.count("aten.mm.default") == 1
    assert max(np.prod(shape) for shape in forward.wide + backward.wide) <= 3 * experts * max(tokens, hidden)
    plain = Shapes()
    with plain:
        x.float()
    assert np.prod(plain.wide[0]) > 3 * experts * max(tokens, hidden)  # such a copy would have been seen


@pytest.mark.parametrize(
    ("activations", "weight", "dtype", "reason"),
    [
        (torch.bfloat16, torch.float32, torch.float32, "cpu has no"),
        (torch.float16, torch.float32, torch.float32, "activations are float16"),
        (torch.bfloat16, torch.float32, torch.float64, "products are float64"),
        (torch.bfloat16, torch.float64, torch.float32, "the weight is float64"),
    ],
)
def test_plain_products_are_used_elsewhere_for_a_reason(
    activations: torch.dtype, weight: torch.dtype, dtype: torch.dtype, reason: str
) -> None:
    assert reason in choose.why_not(torch.device("cpu"), activations, torch.ones(8, 8, dtype=weight), dtype)


def test_a_shape_that_tensor_cores_do_not_take_is_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setitem(split._devices, cuda, "")
    ask = lambda *shape: choose.why_not(cuda, torch.bfloat16, torch.ones(shape), torch.float32)  # noqa: E731
    assert ask(8, 64) == ""
    assert "9 experts x hidden 64" in ask(9, 64)
    assert "8 experts x hidden 60" in ask(8, 60)


def test_a_device_is_tried_once_and_not_under_graph_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, tried = torch.device("cuda", 0), []
    monkeypatch.setattr(split, "_devices", {})
    monkeypatch.setattr(split, "_trial", lambda device: tried.append(device) or "no")
    weight = torch.ones(8, 8)
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert "graph capture" in choose.why_not(cuda, torch.bfloat16, weight, torch.float32)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert [choose.why_not(cuda, torch.bfloat16, weight, torch.float32) for _ in range(2)] == ["no", "no"]
    assert tried == [cuda]


def test_sums_of_bf16_products_are_not_reduced_in_bf16_and_the_switch_is_put_back() -> None:
    switches = torch.backends.cuda.matmul
    before = switches.allow_bf16_reduced_precision_reduction
    try:
        for allowed in (True, False):
            switches.allow_bf16_reduced_precision_reduction = allowed
            with split.exact_products(torch.device("cuda")):
                assert not switches.allow_bf16_reduced_precision_reduction
            assert switches.allow_bf16_reduced_precision_reduction == allowed
    finally:
        switches.allow_bf16_reduced_precision_reduction = before


def test_switches_that_follow_another_one_still_do_after_a_product_in_true_fp32() -> None:
    backends, exact = torch.backends, mm(torch.ones(2, 2), torch.ones(2, 2))
    legacy, before = torch.get_float32_matmul_precision(), backends.fp32_precision
    places = (backends.cuda.matmul, backends.mkldnn.matmul)
    kept = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "none"
        backends.fp32_precision = "tf32"
        with true_fp32():
            assert {place.fp32_precision for place in places} == {"ieee"}
        assert {place.fp32_precision for place in places} == {"tf32"}
        backends.fp32_precision = "ieee"
        assert {place.fp32_precision for place in places} == {"ieee"}
        backends.cuda.matmul.fp32_precision = "tf32"
        assert torch.equal(mm(torch.ones(2, 2), torch.ones(2, 2)), exact)
        assert backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(legacy)
        backends.fp32_precision = before
        for place, value in zip(places, kept, strict=True):
            place.fp32_precision = value


def test_tf32_that_an_nvidia_container_turns_on_by_its_environment_is_off_inside_and_on_again_afterwards() -> None:
    program = """
import torch
from megatron_fp32_router.gating.matmul import true_fp32
switch = lambda: (torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision())
before = switch()
with true_fp32():
    inside = switch()
print(before, inside, switch())
"""
    environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "(True, 'high') (False, 'highest') (True, 'high')\n"
