"""mcore-bridge, ms-swift's: its LoRA on each router, which swaps the class's gating for the time of a forward."""

from __future__ import annotations

import torch
import transformer_engine_stub  # noqa: F401
from common import begin, dtypes, end, parallel, routers, train
from mcore_bridge.tuners import lora


def main() -> None:
    """Compare logits with and without an adapter that adds nothing; then train one that does."""
    folder = begin()
    parallel()
    import tiny

    # TELinear is a stub; on an NPU mcore-bridge takes torch's Linear itself.
    lora._use_legacy_npu_local_linear = lambda: True
    config, model = tiny.model()
    seen: dict[str, object] = {"dtypes": dtypes(model)}
    logits: list[torch.Tensor] = []
    x = torch.randn(16, 1, 64).bfloat16()
    for layer in model.module.decoder.layers:
        router = layer.mlp.router
        plain = router.gating(x)
        layer.mlp.router = lora.LoraParallelLinear(router, "default", r=4, lora_alpha=8)
        with layer.mlp.router._patch_router_gating():
            logits.append(router.gating(x))
        seen["swapped"] = torch.equal(plain, logits[-1]) and plain.dtype == logits[-1].dtype
        seen["logits"] = str(plain.dtype)
        seen["exact"] = torch.equal(plain, torch.nn.functional.linear(x.float(), router.weight.float()))
        torch.nn.init.normal_(layer.mlp.router.lora_B["default"].weight)
    seen["routers"] = len(routers(model))
    end(folder, training=train(model, config), **seen)


main()
