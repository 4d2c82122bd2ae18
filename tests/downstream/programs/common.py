"""What the consumers' programs share: one process that is a whole group, tokens to train on, and a look at the routers.

A program knows nothing of the plugin, but that it looks at `status()` where somebody has imported it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

#: About 1,000 tokens an expert and step: bf16 counts to 256.
EXPERTS, TOPK, SEQUENCE, MICRO_BATCH, MICRO_BATCHES, STEPS, VOCABULARY = 8, 2, 256, 4, 4, 2, 256

#: What a CPU without TransformerEngine leaves to a user of either bridge.
CPU = {
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "moe_shared_expert_overlap": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "moe_router_bias_update_rate": 1e-3,
}


def begin() -> Path:
    """Make the one process a group; the folder that the program may write to."""
    folder = Path(sys.argv[1])
    torch.manual_seed(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    # Upstream's gating computes with it where there is a TransformerEngine, of which there are names only.
    import_module("megatron.core.transformer.moe.moe_utils").te_general_gemm = None  # type: ignore[attr-defined]
    return folder


def parallel() -> None:
    """Megatron's groups, of one rank each, and its random states."""
    import_module("megatron.core.parallel_state").initialize_model_parallel()
    import_module("megatron.core.tensor_parallel.random").model_parallel_cuda_manual_seed(1)


def end(folder: Path, **seen: Any) -> None:
    """Write what was seen, and what the plugin says of itself."""
    plugin = sys.modules.get("megatron_fp32_router")
    seen["status"] = {record.id: [record.state, record.detail] for record in plugin.status()} if plugin else {}
    (folder / "seen.json").write_text(json.dumps(seen), encoding="utf-8")


def routers(model: Any) -> list[tuple[str, Any]]:
    """The TopKRouters of a model, or of a list of its chunks."""
    kind = import_module("megatron.core.transformer.moe.router").TopKRouter
    chunks = model if isinstance(model, (list, tuple)) else [model]
    return [(name, module) for chunk in chunks for name, module in chunk.named_modules() if isinstance(module, kind)]


def dtypes(model: Any) -> dict[str, list[str]]:
    """The dtypes that each floating-point tensor has, over all routers."""
    found: dict[str, set[str]] = {}
    for _, router in routers(model):
        for name in ("weight", "expert_bias", "local_tokens_per_expert"):
            tensor = getattr(router, name, None)
            if tensor is not None:
                found.setdefault(name, set()).add(str(tensor.dtype).removeprefix("torch."))
    return {name: sorted(kinds) for name, kinds in found.items()}


def batches(seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(tokens, positions, mask) of the micro-batches of one step; the tokens are uneven."""
    generator = torch.Generator().manual_seed(seed)
    positions_BS = torch.arange(SEQUENCE).expand(MICRO_BATCH, SEQUENCE)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    for _ in range(MICRO_BATCHES):
        tokens_BS = (torch.rand(MICRO_BATCH, SEQUENCE, generator=generator) ** 3 * VOCABULARY).long()
        yield tokens_BS, positions_BS, mask


def train(model: Any, config: Any) -> dict[str, Any]:
    """Forward and backward for some steps, and after each Megatron's own update of the biases.

    Returns:
        bias: each router's at the end. exact: the same by integers, from the choices that were seen. started: at the
        beginning. losses: one for each micro-batch. gradients: dtypes of the router weights' gradients.
    """
    finalize = import_module("megatron.core.distributed.finalize_model_grads")
    (chunk,) = model if isinstance(model, (list, tuple)) else [model]
    found = [(name, router) for name, router in routers(chunk) if router.enable_expert_bias]
    counts = {name: torch.zeros(EXPERTS, dtype=torch.int64) for name, _ in found}
    started = {name: router.expert_bias.double().tolist() for name, router in found}
    exact = {name: router.expert_bias.float().clone() for name, router in found}

    def counted(name: str, routing: Any) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            probs, routing_map = routing(*args, **kwargs)
            counts[name].add_(routing_map.sum(0, dtype=torch.int64))
            return probs, routing_map

        return count

    # Not a hook on forward: some consumers do not call it.
    for name, router in found:
        router.routing = counted(name, router.routing)
    losses, gradients = [], set()
    for step in range(STEPS):
        for tokens_BS, positions_BS, mask in batches(step):
            loss = chunk(tokens_BS, positions_BS, mask, labels=tokens_BS.roll(-1, 1)).float().mean()
            loss.backward()
            losses.append(loss.item())
        gradients |= {str(router.weight.grad.dtype) for _, router in routers(chunk) if router.weight.grad is not None}
        chunk.zero_grad()
        if found:
            finalize._update_router_expert_bias([chunk], config)
            # Counters begin again; where there is no such function, the update has seen to it.
            getattr(finalize, "reset_model_temporary_tensors", lambda *_: None)(config, [chunk])
        rate = torch.tensor(config.moe_router_bias_update_rate, dtype=torch.float32)
        for name, _ in found:
            counts_E = counts[name]
            exact[name] += torch.sign(counts_E.sum() - EXPERTS * counts_E).float() * rate
            counts_E.zero_()
    for _, router in found:
        del router.routing
    return {
        "started": started,
        "bias": {name: router.expert_bias.double().tolist() for name, router in found},
        "exact": {name: bias.double().tolist() for name, bias in exact.items()},
        "losses": losses,
        "gradients": sorted(gradients),
    }


def rounded(tensor: torch.Tensor) -> bool:
    """Whether bf16 holds every value of it."""
    return torch.equal(tensor.float(), tensor.bfloat16().float())


def identical(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Same dtype, same bits."""
    return left.dtype == right.dtype and torch.equal(left.cpu(), right.cpu())
