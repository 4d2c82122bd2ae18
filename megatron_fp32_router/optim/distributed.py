"""The distributed optimizer's checkpoints: refused while they would hold another parameter's state.

Upstream numbers the parameters of a group in gradient-buffer order and then installs them as fp32 ones first, bf16
ones after (NVIDIA/Megatron-LM #2777). In a group that holds both, which an fp32 router makes of it, every lookup
while saving or loading finds a neighbour's Adam state: silently where the shapes agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_fp32_router.errors import CheckpointRefusedError
from megatron_fp32_router.registry import mismatch, replaces
from megatron_fp32_router.settings import PREFIX


def _numbering_is_stale(optimizer: Any) -> bool:
    """Whether the map from parameters to their place in a group disagrees with the groups as they are."""
    groups = zip(optimizer.model_fp32_groups, optimizer.model_float16_groups, strict=True)
    return any(
        optimizer.model_param_group_index_map[parameter] != (index, order)
        for index, (fp32, float16) in enumerate(groups)
        for order, parameter in enumerate([*fp32, *float16])
    )


def refuse_stale_numbering(original: Callable[..., Any]) -> Callable[..., Any]:
    """DistributedOptimizer's save and load entry points: an error before anything is written or overwritten."""

    @replaces(original)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Without parameters of its own (an empty rank) the optimizer has no groups at all.
        if hasattr(self, "model_param_group_index_map") and _numbering_is_stale(self):
            mismatch(
                CheckpointRefusedError,
                "the distributed optimizer's state was about to be saved or loaded with fp32 router parameters beside "
                "bf16 ones, where this Megatron mixes up which state belongs to which parameter "
                f"(NVIDIA/Megatron-LM #2777). Train with {PREFIX}_PROTECT=buffers, which keeps the balance update "
                "exact and every checkpoint as upstream writes it, or save without optimizer state "
                "(--no-save-optim, --no-load-optim).",
            )
        return original(self, *args, **kwargs)

    return guarded
