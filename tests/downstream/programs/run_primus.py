"""Primus, by the facts of its sources: a class takes TopKRouter's place, and DeepSeek-V4's router is a plain Module.

The first is primus/backends/megatron/patches/moe_patches/topk_router_patches.py, the second
primus/backends/megatron/core/transformer/moe/v4_topk_router.py; the packages around them ask for AMD's GPUs.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import torch
from common import EXPERTS, TOPK, batches, begin, dtypes, end, identical, parallel, routers, train


def replace_topk_router() -> None:
    """Put PrimusTopKRouter where Megatron looks for a router: in two modules, a spec's default and existing specs."""
    router, moe_layer = (import_module(f"megatron.core.transformer.moe.{name}") for name in ("router", "moe_layer"))
    original = router.TopKRouter

    class PrimusTopKRouter(original):  # type: ignore[misc, valid-type]
        def routing(self, logits: torch.Tensor, **kwargs: Any) -> Any:
            scores, routing_map = super().routing(logits, **kwargs)
            assert routing_map.dtype == torch.bool
            return scores, routing_map

    router.TopKRouter = moe_layer.TopKRouter = PrimusTopKRouter
    moe_layer.MoESubmodules.__dataclass_fields__["router"].default = PrimusTopKRouter
    build = moe_layer.MoELayer.__init__

    def init(self: Any, config: Any, submodules: Any = None, *args: Any, **kwargs: Any) -> None:
        if submodules.router is original:
            submodules.router = PrimusTopKRouter
        build(self, config, submodules, *args, **kwargs)

    moe_layer.MoELayer.__init__ = init


class DeepseekV4LearnedRouter(torch.nn.Module):
    """weight [experts, hidden] and expert_bias [experts] are fp32 parameters; logits are fp32, whatever comes in."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(EXPERTS, hidden_size) / 8)
        self.expert_bias = torch.nn.Parameter(0.75 + torch.rand(EXPERTS) / 1000, requires_grad=False)

    def forward(self, hidden: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits_NE = torch.nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]).float(), self.weight.float())
        scores_NE = torch.nn.functional.softplus(logits_NE).sqrt()
        chosen_NK = (scores_NE + self.expert_bias.to(scores_NE.dtype)).topk(TOPK, dim=-1).indices
        map_NE = torch.zeros_like(scores_NE, dtype=torch.bool).scatter(1, chosen_NK, True)
        kept_NE = scores_NE * map_NE
        return kept_NE / kept_NE.sum(-1, keepdim=True), map_NE


def with_plain_routers(tiny: Any) -> dict[str, Any]:
    """What becomes of DeepSeek-V4's routers: refused first where the plugin is on, then protected by one call."""
    made: list[tuple[DeepseekV4LearnedRouter, dict[str, torch.Tensor]]] = []

    def prepare(gpt: Any) -> None:
        made.clear()
        for layer in gpt.decoder.layers:
            layer.mlp.router = router = DeepseekV4LearnedRouter(64)
            made.append((router, {name: tensor.clone() for name, tensor in router.state_dict().items()}))

    plugin, refused = sys.modules.get("megatron_fp32_router"), ""
    if plugin:
        try:
            tiny.model(prepare)
        except plugin.UnprotectedRouterError as error:
            refused = str(error)
        plugin.protect_router_class(DeepseekV4LearnedRouter)
    _, model = tiny.model(prepare)
    tokens_BS, positions_BS, mask = next(batches(0))
    model(tokens_BS, positions_BS, mask, labels=tokens_BS).float().mean().backward()
    tensors = [(tensor, before[name]) for router, before in made for name, tensor in router.state_dict().items()]
    return {
        "refused": refused,
        "kept": [identical(*pair) for pair in tensors],
        "dtypes": sorted({str(tensor.dtype) for tensor, _ in tensors}),
        "gradients": sorted({str(router.weight.grad.dtype) for router, _ in made if router.weight.grad is not None}),
    }


def main() -> None:
    """Train with the one; build, wrap and run a model with the other."""
    folder = begin()
    parallel()
    replace_topk_router()
    import tiny

    config, model = tiny.model()
    kinds = sorted({type(router).__name__ for _, router in routers(model)})
    end(folder, kinds=kinds, dtypes=dtypes(model), training=train(model, config), plain=with_plain_routers(tiny))


main()
