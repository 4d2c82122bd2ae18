"""The laboratory's kernels are TransformerEngine's arithmetic, and its own FusedAdam runs on them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bootstrap import ensure_transformer_engine

from megatron_fp32_router.lab import compat, kernels, mamba, transformer_engine

f32 = np.float32
NOOP = torch.zeros(1, dtype=torch.int)
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "step": 3, "mode": 1, "bias": 1, "decay": 0.1}
MOMENTS = [torch.float32, torch.bfloat16]


def some(dtype: torch.dtype, count: int = 1000, seed: int = 0, factor: float = 1.0) -> torch.Tensor:
    return (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * factor).to(dtype)


def by_hand(p: Any, g: Any, m: Any, v: Any, **hyper: Any) -> tuple[Any, Any, Any]:
    """adam.cu, AdamFunctor, one operation after another in NumPy's float32: parameter and moments after the step."""
    h = {**HYPER, **hyper}
    beta1, beta2, decay = f32(h["beta1"]), f32(h["beta2"]), f32(h["decay"])
    # std::pow of a float and an int is a double.
    correction1 = f32(1 - float(beta1) ** h["step"]) if h["bias"] else f32(1)
    correction2 = f32(1 - float(beta2) ** h["step"]) if h["bias"] else f32(1)
    p, g, m, v = (tensor.float().numpy() for tensor in (p, g, m, v))
    if h["mode"] == 0:
        g = g + decay * p
    m = beta1 * m + (f32(1) - beta1) * g
    v = beta2 * v + (f32(1) - beta2) * g * g
    update = (m / correction1) / (np.sqrt(v / correction2) + f32(h["epsilon"]))
    if h["mode"] == 1:
        update = update + decay * p
    return p - f32(h["lr"]) * update, m, v


def called(kernel: Any, lists: list[list[torch.Tensor]], **hyper: Any) -> None:
    kernel(2048 * 32, NOOP, lists, *{**HYPER, **hyper}.values())


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("hyper", [{}, {"mode": 0}, {"bias": 0}, {"step": 1000}])
def test_adam_is_the_formula_of_adam_cu(hyper: Any, moments: torch.dtype) -> None:
    for grads in (torch.float32, torch.bfloat16):
        for params in (torch.float32, torch.bfloat16):
            g, p = some(grads), some(params, seed=1)
            m, v, main = some(moments, seed=2), some(moments, seed=3).abs(), some(torch.float32, seed=4)
            # Without main copies, and with them.
            for own in ([], [main]):
                new = [tensor.clone() for tensor in (g, p, m, v, *own)]
                called(kernels.adam, [[tensor] for tensor in new], **hyper)
                for found, expected in zip(new[1:], by_hand(own[0] if own else p, g, m, v, **hyper), strict=False):
                    assert torch.equal(found, torch.from_numpy(expected).to(found.dtype))
                if own:
                    assert torch.equal(new[1], new[4].to(params))


def test_a_parameter_and_its_remainder_are_one_fp32_number() -> None:
    # Halves between two bf16 numbers, both signs, zero, and numbers whose upper half carries into the exponent.
    main = torch.cat([some(torch.float32), torch.tensor([0.0, -0.0, 1.00390625, -1.00390625, 0.99999994, 3.4e38])])
    bits = main.view(torch.int32)
    rest = (((bits & 0xFFFF) ^ 0x8000) - 0x8000).to(torch.int16)
    param = ((bits >> 16) + (rest < 0)).to(torch.int16).view(torch.bfloat16)
    assert (param.float() - main).abs().max() <= (main.bfloat16().float() - main).abs().max()
    g, m, v = some(torch.bfloat16, main.numel()), torch.zeros(main.numel()), torch.zeros(main.numel())
    same = [tensor.clone() for tensor in (g, main, m, v)]
    called(kernels.adam, [[tensor] for tensor in same])
    called(kernels.adam_param_remainder, [[g], [param], [m], [v], [rest]])
    upper = param.view(torch.int16) - (rest < 0).to(torch.int16)
    assert torch.equal(((upper.int() << 16) | (rest.int() & 0xFFFF)).view(torch.float32), same[1])
    assert torch.equal(m, same[2])
    # To nearest, ties away from zero.
    assert (param.float() - same[1]).abs().le((same[1].bfloat16().float() - same[1]).abs()).all()


def test_adam_checks_what_the_kernel_checks() -> None:
    good = [[some(dtype), some(dtype)] for dtype in [torch.float32] * 4]
    bad = some(torch.bfloat16)
    for place, message in (
        (0, "one dtype each"),
        (1, "one dtype each"),
        (2, "both be Float32"),
        (3, "both be Float32"),
    ):
        lists = [list(tensors) for tensors in good]
        lists[place][1] = bad
        with pytest.raises(RuntimeError, match=message):
            called(kernels.adam, lists)
    with pytest.raises(RuntimeError, match=r"int16"):
        called(kernels.adam_param_remainder, [*good, good[0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_is_that_of_fp64(dtype: torch.dtype) -> None:
    tensors = [some(dtype), some(dtype, 7, seed=1)]
    norm, each = kernels.l2norm(2048 * 32, NOOP, [tensors], True)
    exact = [tensor.double().norm() for tensor in tensors]
    assert norm.item() == pytest.approx(torch.stack(exact).norm().item(), rel=1e-6)
    assert each.tolist() == pytest.approx([value.item() for value in exact], rel=1e-6)
    assert norm.shape == (1,)
    flag = torch.zeros(1, dtype=torch.int)
    kernels.l2norm(2048 * 32, flag, [[some(dtype), torch.tensor([float("inf")], dtype=dtype)]])
    assert flag.item() == 1


def test_the_kernels_read_every_tensor_as_the_first_ones_type() -> None:
    """TRANSFORMER_ENGINE_TYPE_SWITCH_NON_FP8ONLY(tensor_lists[0][0]->dtype(), …), and then pointers."""
    memory = some(torch.bfloat16, 2000)
    fp32, bf16 = some(torch.float32), memory[:1000]
    norm, _ = kernels.l2norm(2048 * 32, NOOP, [[fp32, bf16]])
    # As many numbers of four bytes as the tensor has of two: the memory behind it is read as well.
    misread = memory.view(torch.float32)
    assert torch.equal(norm, (fp32.square().sum() + misread.square().sum()).sqrt().view(1))
    kernels.scale(2048 * 32, NOOP, [[fp32, bf16]] * 2, 0.5)
    assert torch.equal(memory.view(torch.float32), some(torch.bfloat16, 2000).view(torch.float32) * 0.5)
    # Nothing can be read here behind the end of the allocation.
    assert kernels.l2norm(2048 * 32, NOOP, [[fp32, some(torch.bfloat16, 3)]])[0].shape == (1,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaling_is_a_product_in_fp32(dtype: torch.dtype) -> None:
    for factor in (0.3, torch.tensor([0.3])):
        source, target = some(dtype), torch.zeros(1000, dtype=dtype)
        kernels.scale(2048 * 32, NOOP, [[source], [target]], factor)
        assert torch.equal(target, torch.from_numpy(source.float().numpy() * f32(0.3)).to(dtype))


class Quantizer:
    """What the kernel asks of a Float8Quantizer."""

    def __init__(self, scale: float) -> None:
        self.scale, self.amax = torch.tensor([scale]), torch.zeros(1)


def test_fp8_is_the_nearest_e4m3_number_and_saturates() -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].double()
    values = torch.cat([some(torch.float32, factor=100.0), torch.tensor([448.0, 464.0, 1e6, -1e6, 0.0])])
    target = type("Float8", (), {"_data": torch.zeros(values.numel(), dtype=torch.uint8), "_scale_inv": torch.ones(1)})
    quantizer = Quantizer(2.0)
    kernels.quantize(values, quantizer, target)
    found = target._data.view(torch.float8_e4m3fn).double()
    scaled = (values * 2.0).double()
    assert (found - scaled).abs().eq((numbers[:, None] - scaled).abs().min(0).values).all()
    assert quantizer.amax.item() == 1e6
    assert target._scale_inv.item() == 0.5


# The router's product and its fused kernels ------------------------------------------------------------------------


def test_gemm_multiplies_in_tf32_only_where_everything_is_fp32_and_refuses_mixed_operands() -> None:
    a, b = some(torch.float32, 64 * 32).view(64, 32), some(torch.float32, 16 * 32, seed=1).view(16, 32)
    fp32, exact = transformer_engine._Compiled.DType.kFloat32, b.double() @ a.double().t()

    def error(x: torch.Tensor, y: torch.Tensor, truth: torch.Tensor) -> float:
        out = kernels.gemm(x, True, y, False, None, None, fp32, None)[0]
        assert out is not None
        assert (out.shape, out.dtype) == ((16, 64), torch.float32)
        return float((out.double() - truth).abs().mean())

    assert error(a, b, exact) > 1e-4
    low = a.bfloat16(), b.bfloat16()
    assert error(*low, low[1].double() @ low[0].double().t()) < 1e-6
    with pytest.raises(RuntimeError, match="Unable to find suitable cuBLAS GEMM algorithm"):
        kernels.gemm(a, True, b.bfloat16(), False, None, None, fp32, None)


def routed_by_hand(logits: Any, bias: Any, topk: int, groups: int, group_topk: int, scale: float) -> Any:
    """fused_topk_with_score_function.cu for sigmoid, token by token in NumPy's float32: probabilities, experts."""
    probs, chosen = np.zeros_like(logits), []
    for token, row in enumerate(logits):
        scores = f32(1) / (f32(1) + np.exp(-row)) + bias
        if group_topk:
            size = len(row) // groups
            best = [np.sort(scores[g * size : (g + 1) * size])[-(topk // group_topk) :].sum() for g in range(groups)]
            for g in np.argsort(best)[: groups - group_topk]:
                scores[g * size : (g + 1) * size] = -np.inf
        experts = np.argsort(-scores)[:topk]
        values = scores[experts] - bias[experts]
        if topk > 1:
            values = values / (values.sum() + f32(1e-20))
        probs[token, experts] = f32(scale) * values
        chosen.append(set(experts.tolist()))
    return probs, chosen


@pytest.mark.parametrize(("topk", "groups", "group_topk"), [(1, 0, 0), (4, 0, 0), (4, 4, 2)])
def test_the_fused_router_is_the_formula_of_its_source(topk: int, groups: int, group_topk: int) -> None:
    logits = some(torch.float32, 200 * 16).view(200, 16)
    bias = 6.9 + some(torch.float32, 16, seed=1, factor=0.1)
    given = (topk, False, groups or None, group_topk or None, 2.5, "sigmoid", bias)
    probs, routing_map, saved = kernels.fused_topk(logits, *given)
    expected, chosen = routed_by_hand(logits.numpy(), bias.numpy(), topk, groups, group_topk, 2.5)
    np.testing.assert_allclose(probs.numpy(), expected, rtol=1e-5)
    assert [set(row.nonzero().flatten().tolist()) for row in routing_map] == chosen
    # s + 6.9 - 6.9 is not s: bits that adding the bias rounded away are lost, as in the kernel.
    if topk == 1:
        assert (probs[routing_map] != 2.5 * saved[routing_map]).any()


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
@pytest.mark.parametrize("pre_softmax", [False, True])
def test_the_gradients_of_the_fused_router_are_those_of_its_forward(score_function: str, pre_softmax: bool) -> None:
    logits = some(torch.float32, 50 * 16).view(50, 16).double().requires_grad_()
    grad, scale = some(torch.float32, 50 * 16, seed=1).view(50, 16), 2.5
    _, routed, saved = kernels.fused_topk(
        logits.detach().float(), 4, pre_softmax, None, None, scale, score_function, None
    )
    if score_function == "sigmoid":
        values = logits.sigmoid() * routed
        probs = values / values.sum(dim=-1, keepdim=True)
    else:
        probs = (logits if pre_softmax else logits.masked_fill(~routed, -torch.inf)).softmax(dim=-1) * routed
    (wanted,) = torch.autograd.grad(scale * probs, logits, grad.double())
    found = torch.empty_like(grad)
    kernels.fused_topk_backward(routed, saved, grad, found, 4, pre_softmax, scale, score_function)
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-5)
    # And those of the scores for auxiliary losses.
    scores, _, act = kernels.fused_scores(logits.detach().float(), 4, score_function)
    exact = logits.softmax(dim=-1)
    if score_function == "sigmoid":
        exact = logits.sigmoid() / logits.sigmoid().sum(dim=-1, keepdim=True)
    torch.testing.assert_close(scores.double(), exact.detach(), atol=1e-6, rtol=1e-5)
    (wanted,) = torch.autograd.grad(exact, logits, grad.double())
    kernels.fused_scores_backward(act, grad, found, 4, score_function)
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-5)


def test_the_fused_loss_is_its_formula_and_takes_no_fp16_or_fp64_counts() -> None:
    probs, counts = some(torch.float32, 50 * 16).view(50, 16).abs(), torch.arange(16)
    loss, saved = kernels.fused_aux_loss(probs, counts, 50, 16, 50, 16, 4, 0.01)
    each = 16 * 0.01 / 4 / 50**2 * counts.double()
    torch.testing.assert_close(loss.double(), (probs.double() * each).sum(), atol=0, rtol=1e-5)
    grad = kernels.fused_aux_loss_backward(saved, counts, 50, 16, torch.tensor(2.0))
    torch.testing.assert_close(grad.double(), 2 * each.expand(50, 16), atol=0, rtol=1e-5)
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(RuntimeError, match="Unsupported router index dtype"):
            kernels.fused_aux_loss(probs, counts.to(dtype), 50, 16, 50, 16, 4, 0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_fused_router_takes_a_bias_in_fp32_only(dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match="expert_bias must be a float32 tensor"):
        kernels.fused_topk(torch.zeros(2, 8), 2, False, None, None, None, "sigmoid", torch.zeros(8, dtype=dtype))


# TransformerEngine's own class -----------------------------------------------------------------------------------


@pytest.fixture
def fused_adam(monkeypatch: pytest.MonkeyPatch) -> Any:
    before = set(sys.modules)
    monkeypatch.setattr(torch, "tensor", lambda *a, real=torch.tensor, **k: real(*a, **{**k, "device": "cpu"}))
    modules = transformer_engine._imported(ensure_transformer_engine(), "optimizers")
    assert not {name for name in set(sys.modules) - before if name.startswith(("transformer_engine", "pydantic"))}
    return modules["transformer_engine.pytorch.optimizers"].FusedAdam


@pytest.mark.parametrize("remainders", [False, True])
def test_its_fused_adam_moves_bf16_and_fp32_parameters_as_the_formula_says(remainders: bool, fused_adam: Any) -> None:
    bf16, fp32 = (torch.nn.Parameter(some(dtype, seed=5)) for dtype in (torch.bfloat16, torch.float32))
    optimizer = fused_adam(
        [bf16, fp32],
        lr=HYPER["lr"],
        betas=(HYPER["beta1"], HYPER["beta2"]),
        weight_decay=HYPER["decay"],
        master_weights=True,
        use_decoupled_grad=True,
        store_param_remainders=remainders,
    )
    expected = [(parameter.detach().float(), torch.zeros(1000), torch.zeros(1000)) for parameter in (bf16, fp32)]
    for step in (1, 2, 3):
        for place, parameter in enumerate((bf16, fp32)):
            parameter.decoupled_grad = some(parameter.dtype, seed=10 * step + place)
            p, m, v = expected[place]
            new = by_hand(p, parameter.decoupled_grad, m, v, step=step)
            expected[place] = tuple(map(torch.from_numpy, new))
        optimizer.step()
    assert torch.equal(fp32.detach(), expected[1][0])
    rest = optimizer.state[bf16]["master_param"]
    if remainders:
        upper = bf16.detach().view(torch.int16) - (rest < 0).to(torch.int16)
        rest = ((upper.int() << 16) | (rest.int() & 0xFFFF)).view(torch.float32)
    assert torch.equal(rest, expected[0][0])
    # What is wrong with it: nobody ever updates the fp32 parameter's main copy (NVIDIA/Megatron-LM #7338).
    assert torch.equal(optimizer.state[fp32]["master_param"], some(torch.float32, seed=5))


def test_mambas_scan_is_its_recurrence() -> None:
    """One state after another, as Mamba-2 is defined."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 9, 4, 3), "dt": (2, 9, 4), "b": (2, 9, 2, 5), "c": (2, 9, 2, 5), "a": (4,), "d": (4,)}
    x, dt, b, c, a, d = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes.values())
    dt, a = dt.abs(), -a.abs()
    states = torch.zeros(2, 4, 3, 5, dtype=torch.float64)
    expected = []
    for t in range(9):
        into, out = (part[:, t].repeat_interleave(2, 1) for part in (b, c))
        new = dt[:, t, :, None, None] * x[:, t, :, :, None] * into[:, :, None]
        states = (dt[:, t] * a).exp()[:, :, None, None] * states + new
        expected.append(torch.einsum("bhpn,bhn->bhp", states, out) + d[:, None] * x[:, t])
    torch.testing.assert_close(mamba.scan(x, dt, a, b, c, d), torch.stack(expected, 1), rtol=1e-12, atol=1e-12)


def test_triton_is_stood_in_for_where_kernels_are_decorated_without_it(tmp_path: Path) -> None:
    """As on main from 2025-04-08 to 2025-07-05, which cannot be imported otherwise."""
    file = tmp_path / "megatron" / "core" / "fusions" / "fused_indices_converter.py"
    file.parent.mkdir(parents=True)
    for text, needed in (("triton = MagicMock()\n", False), ("triton = None\n\n\n@triton.jit\n", True)):
        file.write_text(text, encoding="utf-8")
        assert compat._needs_triton(tmp_path) == needed
