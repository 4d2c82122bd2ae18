"""Patches that make the balance update of expert_bias exact."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from megatron_fp32_router.patching.record import FINALIZE, MOE_UTILS, ROUTER, UPSTREAM, Patch, deferred

if TYPE_CHECKING:
    from megatron_fp32_router.balance import rule, update
else:
    rule, update = deferred(__package__, "rule"), deferred(__package__, "update")

#: with_context_parallel=True gives the ranks that share a balance update.
_GROUP: Final = "megatron.core.parallel_state:get_tensor_and_data_parallel_group"
#: The update comes once a step, after the gradients are reduced, and the reset after it.
_ONCE_A_STEP: Final = f"{FINALIZE}:finalize_model_grads"

_rule: Final = partial(
    Patch,
    path="get_updated_expert_bias",
    factory=rule.exact_rule,
    issue=f"{UPSTREAM}/pull/7081",
    parameters=("tokens_per_expert", "expert_bias", "expert_bias_update_rate"),
    relies_on=(_GROUP,),
    supersedes=True,
)

PATCHES: Final = (
    _rule(
        id="bias-rule",
        module=MOE_UTILS,
        why="token counts are reduced and compared in bf16 or fp16, so updates go the wrong way or stop",
        remove_when="counts are integers through the all-reduce and the comparison",
        repairs=("D6", "D7", "D8"),
    ),
    _rule(
        id="bias-rule-in-finalize",
        module=FINALIZE,
        why="the name that finalize_model_grads imported early would still be upstream's",
        remove_when="the bias-rule patch goes",
        goes_with="bias-rule",
    ),
    Patch(
        id="bias-update",
        module=FINALIZE,
        path="_update_router_expert_bias",
        factory=update.exact_update,
        why="counts are stacked in bf16 or fp16; layers with different numbers of experts, or without a bias, crash",
        issue=f"{UPSTREAM}/pull/7081",
        remove_when="counts are integers and layers are grouped by their number of experts",
        repairs=("D6", "D7", "D8", "D24"),
        parameters=("model", "config"),
        # Tokens are added to local_tokens_per_expert once in every forward with gradients.
        relies_on=(_GROUP, _ONCE_A_STEP, f"{ROUTER}:TopKRouter.routing TopKRouter._apply_expert_bias"),
        supersedes=True,
    ),
    Patch(
        id="counter-reset",
        module=FINALIZE,
        path="reset_model_temporary_tensors",
        factory=update.reset_in_one_go,
        why="a router whose bias is None crashes; every counter is zeroed by a kernel of its own",
        issue=f"{UPSTREAM}/pull/7081",
        remove_when="upstream skips routers without a bias",
        repairs=("D25",),
        since="0.15",
        absent_where=("_update_router_expert_bias uses zero_",),
        parameters=("config", "model"),
        relies_on=(
            _ONCE_A_STEP,
            # It zeroes global_tokens_per_expert and ga_steps.
            f"{ROUTER}:TopKRouter.reset_global_aux_loss_tracker",
            # It reads the accumulators before they are zeroed.
            f"{FINALIZE}:_update_router_qb_beta",
        ),
        supersedes=True,
    ),
)
