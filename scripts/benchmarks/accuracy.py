"""How exact the router's three products are in fp32, TF32, bf16 and split bf16, against fp64.

TF32 is emulated (both operands rounded to 11 bits of significand, exact products, fp32 sums) and so are split products
off CUDA; the order in which a tensor core adds is not emulated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_fp32_router.compat.device import Operands, chosen_experts
from megatron_fp32_router.gating import split
from megatron_fp32_router.gating.matmul import mm, tf32

WAYS = ("fp32", "split", "TF32", "bf16")


def synthetic(tokens: int = 1024, hidden: int = 1024, experts: int = 64, seed: int = 6) -> dict[str, Operands]:
    """The distributions that need no model. T, H and E even."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    def heavy(*shape: int) -> torch.Tensor:
        """Student's t with two degrees of freedom: no variance."""
        return normal(*shape) / (normal(*shape) ** 2 + normal(*shape) ** 2).sqrt().clamp_min(1e-3)

    x, w, g = normal(tokens, hidden), 0.02 * normal(experts, hidden), 1e-4 * normal(tokens, experts)
    cases = {"random": Operands(x.bfloat16(), w, g)}

    # Neighbours cancel to about a thousandth, in the sum over hidden, over experts and over tokens.
    def nearly(t: torch.Tensor) -> torch.Tensor:
        return t * (1 + 1e-3 * normal(*t.shape))

    pair_x = x[::2, ::2].repeat_interleave(2, 0).repeat_interleave(2, 1)
    pair_w = w[::2, ::2].repeat_interleave(2, 0).repeat_interleave(2, 1)
    pair_g = g[::2, ::2].repeat_interleave(2, 0).repeat_interleave(2, 1)
    pair_w[:, 1::2] *= -1
    pair_g[:, 1::2] *= -1
    pair_g[1::2] *= -1
    cases["ill-conditioned"] = Operands(pair_x.bfloat16(), nearly(pair_w), nearly(pair_g))

    x = heavy(tokens, hidden)
    x[:, ::97] *= 300  # a few channels of outliers, as language models have
    g = heavy(tokens, experts) * 10 ** (4 * torch.rand(tokens, experts, generator=random) - 8)
    cases["heavy-tailed"] = Operands(x.bfloat16(), 0.02 * heavy(experts, hidden), g)
    return cases


def real(steps: int = 20, **fields: Any) -> Operands:
    """Of a router trained for `steps` steps under the plugin. Needs lab.prepare and no open process group."""
    import megatron_fp32_router
    from megatron_fp32_router import lab

    recipe = lab.Recipe(**{"hidden": 256, "experts": 32, "topk": 8, "seq_length": 256, **fields})
    seen: list[torch.Tensor] = []
    megatron_fp32_router.enable()
    with lab.parallel(recipe):
        room = lab.build(recipe)
        batches = lab.text_batches(recipe, seed=6)
        for _ in range(steps):
            room.step(batches)
        router = room.routers()[-1][1]
        original, weight = router.gating, router.weight.detach().clone()

        def gating(input: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = original(input)
            if logits.requires_grad:
                seen.append(input.detach().reshape(-1, input.shape[-1]))
                logits.register_hook(lambda grad: seen.append(grad.detach().float().reshape(-1, grad.shape[-1])))
            return logits

        router.gating = gating
        room.step(batches)
        del router.gating
    megatron_fp32_router.disable()
    assert weight.dtype == torch.float32
    return Operands(torch.cat(seen[::2]).bfloat16(), weight, torch.cat(seen[1::2]))


def _split_products(o: Operands) -> dict[str, torch.Tensor]:
    parts, experts = split.split_weight(o.w), o.w.shape[0]
    grad_input, grad_weight = split.gradients(o.g, o.x, parts, True, True)
    assert grad_input is not None
    assert grad_weight is not None
    with split.exact_products(o.x.device):
        pieces = torch.cat([parts, parts[experts:], parts[2 * experts :]])
        unrounded = split.to_fp32(split.split_gradient(o.g, 6), pieces)
    return _named(split.logits(o.x, parts, experts, None), grad_weight, unrounded, grad_input)


def _products(o: Operands, to: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    x, w, g = to(o.x), to(o.w), to(o.g)
    grad_input = mm(g, w)
    return _named(mm(x, w.t()), mm(g.t(), x), grad_input, grad_input.bfloat16())


def _named(logits: torch.Tensor, weight: torch.Tensor, unrounded: torch.Tensor, input: torch.Tensor) -> dict[str, Any]:
    return {
        "logits": logits,
        "gradient of the weight": weight,
        "gradient of the input, before it is rounded to bf16": unrounded,
        "gradient of the input": input,
    }


def all_ways(o: Operands) -> dict[str, dict[str, torch.Tensor]]:
    """way -> product -> result. "fp64" is the reference; "bf16" rounds operands and results, as upstream does."""
    rounded = _products(o, lambda t: t.bfloat16().float())
    return {
        "fp64": _products(o, torch.Tensor.double) | {"gradient of the input": mm(o.g.double(), o.w.double())},
        "fp32": _products(o, torch.Tensor.float),
        "split": _split_products(o),
        "TF32": _products(o, tf32),
        "bf16": {name: result.bfloat16() for name, result in rounded.items()},
    }


def errors(o: Operands) -> dict[str, Any]:
    """Maximum and mean error of every way and product, each relative to the sum of its absolute terms, sum |a b|.

    That is what error bounds of matrix products speak of. Relative to the largest result, one outlier would decide.
    """
    results = all_ways(o)
    exact = results.pop("fp64")
    x, w, g = (t.double().abs() for t in o)
    units = _named(mm(x, w.t()), mm(g.t(), x), mm(g, w), mm(g, w))
    table: dict[str, Any] = {}
    for name, reference in exact.items():
        table[name] = {}
        for way in WAYS:
            # An expert that no token chose has no terms at all, and no error.
            error = (results[way][name].double() - reference).abs() / units[name].clamp_min(1e-300)
            table[name][way] = {"max": float(error.max()), "mean": float(error.mean())}
    best = chosen_experts(exact["logits"])
    table["tokens that get other experts"] = {
        way: float((chosen_experts(results[way]["logits"]) != best).any(dim=1).double().mean()) for way in WAYS
    }
    return table
