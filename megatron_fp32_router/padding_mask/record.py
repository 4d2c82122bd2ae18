"""The patch that takes padding tokens out of the token counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from megatron_fp32_router.patching.record import ROUTER, UPSTREAM, Patch, deferred

if TYPE_CHECKING:
    from megatron_fp32_router.padding_mask import mask
else:
    mask = deferred(__package__, "mask")

PATCHES: Final = (
    Patch(
        id="padding-mask",
        module=ROUTER,
        path="TopKRouter._apply_expert_bias",
        factory=mask.mask_padding_per_token,
        why="a padding mask is broadcast along experts instead of tokens: a crash, or wrong counts",
        issue=f"{UPSTREAM}/issues/6111",
        remove_when="_apply_expert_bias broadcasts the mask itself (#6114)",
        repairs=("D23",),
        since="0.16",
        absent_where=("TopKRouter.routing uses local_tokens_per_expert",),
        native_where=(
            "TopKRouter._apply_expert_bias uses unsqueeze",
            "TopKRouter._apply_expert_bias lacks padding_mask",
        ),
        parameters=("routing_map", "padding_mask"),
        # The mask arrives with one entry a token, and the map has one row a token.
        relies_on=(f"{ROUTER}:TopKRouter.routing",),
    ),
)
