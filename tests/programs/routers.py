"""What tests/megatron/test_gating.py and test_like.py share: a router as Float16Module leaves it, and three steps."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from megatron_fp32_router import lab


def wrapped(router: Any, **fields: Any) -> Any:
    built = router(**fields)
    import_module("megatron.core.transformer.module").Float16Module(built.config, built)
    return built


def trained(build: Any, **fields: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, and every parameter and buffer afterwards."""
    room = build(**fields)
    batches = lab.text_batches(room.recipe, seed=3)
    losses = [room.step(batches) for _ in range(3)]
    tensors = [*room.chunks[0].named_parameters(), *room.chunks[0].named_buffers()]
    return losses, {name: tensor.detach().clone() for name, tensor in tensors}
