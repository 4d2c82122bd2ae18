"""The patch records: what is patched, what goes wrong without it, and since when and until when it is needed.

One record a target. Nothing here imports torch or Megatron: `factory` names the function in protect/ or optim/
that makes the replacement, and it is loaded when the Megatron module that it patches has been imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_ROUTER: Final = "megatron.core.transformer.moe.router"
_MOE_UTILS: Final = "megatron.core.transformer.moe.moe_utils"
_FINALIZE: Final = "megatron.core.distributed.finalize_model_grads"
_DISTRIBUTED_OPTIMIZER: Final = "megatron.core.optimizer.distrib_optimizer"
_SCHEDULES: Final = "megatron.core.pipeline_parallel.schedules"
_ISSUES: Final = "https://github.com/NVIDIA/Megatron-LM"


@dataclass(frozen=True)
class Patch:
    """One patched function.

    Attributes:
        id: a name for messages and status().
        module: the Megatron module that holds the target.
        path: the target inside it, `name` or `Class.method`.
        factory: `room.file:function` inside the package; the function takes the original and returns the replacement.
        why: what goes wrong without it.
        issue: where upstream discusses it.
        remove_when: how to see that upstream made it needless.
        since: the first release that has the function.
        until: the first release that no longer has it, None while it lives.
        parameters: parameters of the target that the replacement relies on, in order.
        inherited: whether the target may come from a base class (torch's own method).
        essential: whether training without it is wrong. False: it is only slower.
    """

    id: str
    module: str
    path: str
    factory: str
    why: str
    issue: str
    remove_when: str
    since: str = "0.11"
    until: str | None = None
    parameters: tuple[str, ...] = ()
    inherited: bool = False
    essential: bool = True

    @property
    def target(self) -> str:
        """The target's full dotted name."""
        return f"{self.module}.{self.path}"


PATCHES: Final = (
    Patch(
        id="router-init",
        module=_ROUTER,
        path="Router.__init__",
        factory="protect.casts:initialise_in_fp32",
        why="the router weight is cast to params_dtype as soon as it is initialised",
        issue=f"{_ISSUES}/pull/683",
        remove_when="Router.__init__ no longer casts (from 0.13 reset_parameters does)",
        until="0.13",
        parameters=("self", "config"),
    ),
    Patch(
        id="router-reset",
        module=_ROUTER,
        path="Router.reset_parameters",
        factory="protect.casts:reset_in_fp32",
        why="router weight and bias are cast to params_dtype as soon as they are initialised",
        issue=f"{_ISSUES}/pull/683",
        remove_when="reset_parameters leaves the router's parameters in fp32",
        since="0.13",
        parameters=("self",),
    ),
    Patch(
        id="router-casts",
        module=_ROUTER,
        path="TopKRouter._apply",
        factory="protect.casts:keep_fp32",
        why="bfloat16(), half() and to(dtype) round the router's weight, biases and token counts",
        issue=f"{_ISSUES}/issues/1482",
        remove_when="every router tensor carries main's keep_in_fp32 mark (#5929) through device moves",
        parameters=("self", "fn"),
        inherited=True,
    ),
    Patch(
        id="gating",
        module=_ROUTER,
        path="Router.gating",
        factory="protect.gating:compute_in_fp32",
        why="logits and router gradients are computed in bf16 or TF32, or the fp32 weight is rounded on the way",
        issue=f"{_ISSUES}/issues/1421",
        remove_when="gating computes fp32 logits from an fp32 weight without TF32",
        parameters=("self", "input"),
    ),
    Patch(
        id="router-output",
        module=_ROUTER,
        path="TopKRouter.forward",
        factory="protect.gating:hand_on_upstream_dtype",
        why="fp32 probabilities would reach a dispatcher that expects the model's dtype",
        issue=f"{_ISSUES}/issues/1421",
        remove_when="the gating patch goes",
        parameters=("self", "input"),
    ),
    Patch(
        id="inference-output",
        module=_ROUTER,
        path="InferenceTopKRouter._forward",
        factory="protect.gating:hand_on_upstream_dtype",
        why="fp32 probabilities would reach a dispatcher that expects the model's dtype",
        issue=f"{_ISSUES}/issues/1421",
        remove_when="the gating patch goes",
        since="0.17",
        parameters=("self", "input"),
    ),
    Patch(
        id="padding-mask",
        module=_ROUTER,
        path="TopKRouter._apply_expert_bias",
        factory="protect.balance:mask_padding_per_token",
        why="a padding mask is broadcast along experts instead of tokens: a crash, or wrong counts",
        issue=f"{_ISSUES}/issues/6111",
        remove_when="_apply_expert_bias broadcasts the mask itself (#6114)",
        since="0.16",
        parameters=("self", "routing_map", "padding_mask"),
    ),
    Patch(
        id="bias-rule",
        module=_MOE_UTILS,
        path="get_updated_expert_bias",
        factory="protect.balance:exact_rule",
        why="token counts are reduced and compared in bf16 or fp16, so updates go the wrong way or stop",
        issue=f"{_ISSUES}/pull/7081",
        remove_when="counts are integers through the all-reduce and the comparison",
        parameters=("tokens_per_expert", "expert_bias", "expert_bias_update_rate"),
    ),
    Patch(
        id="bias-rule-in-finalize",
        module=_FINALIZE,
        path="get_updated_expert_bias",
        factory="protect.balance:exact_rule",
        why="the name that finalize_model_grads imported early would still be upstream's",
        issue=f"{_ISSUES}/pull/7081",
        remove_when="the bias-rule patch goes",
        parameters=("tokens_per_expert", "expert_bias", "expert_bias_update_rate"),
    ),
    Patch(
        id="bias-update",
        module=_FINALIZE,
        path="_update_router_expert_bias",
        factory="protect.balance:exact_update",
        why="counts are stacked in bf16 or fp16; layers with different numbers of experts, or without a bias, crash",
        issue=f"{_ISSUES}/pull/7081",
        remove_when="counts are integers and layers are grouped by their number of experts",
        parameters=("model", "config"),
    ),
    Patch(
        id="counter-reset",
        module=_FINALIZE,
        path="reset_model_temporary_tensors",
        factory="protect.balance:reset_in_one_go",
        why="a router whose bias is None crashes; every counter is zeroed by a kernel of its own",
        issue=f"{_ISSUES}/pull/7081",
        remove_when="upstream skips routers without a bias",
        since="0.15",
        parameters=("config", "model"),
    ),
    Patch(
        id="wrap-check",
        module="megatron.core.transformer.module",
        path="Float16Module.__init__",
        factory="protect.effect:look_after_wrapping",
        why="nobody would see whether the routers really stayed fp32",
        issue=f"{_ISSUES}/issues/1482",
        remove_when="router-casts goes",
        parameters=("self", "config", "module"),
    ),
    Patch(
        id="optimizer-checkpoint",
        module=_DISTRIBUTED_OPTIMIZER,
        path="DistributedOptimizer.sharded_state_dict",
        factory="optim.distributed:refuse_stale_numbering",
        why="with fp32 router parameters, optimizer checkpoints silently hold another parameter's state",
        issue=f"{_ISSUES}/issues/2777",
        remove_when="the index map follows the groups (#5835)",
        parameters=("self",),
    ),
    Patch(
        id="optimizer-checkpoint-legacy",
        module=_DISTRIBUTED_OPTIMIZER,
        path="DistributedOptimizer.get_parameter_state_dp_zero",
        factory="optim.distributed:refuse_stale_numbering",
        why="with fp32 router parameters, optimizer checkpoints silently hold another parameter's state",
        issue=f"{_ISSUES}/issues/2777",
        remove_when="the index map follows the groups (#5835)",
        parameters=("self",),
    ),
    *(
        Patch(
            id=f"step-{name}",
            module=_SCHEDULES,
            path=path,
            factory="protect.split_cache:keep_splits",
            why="router weights are split again in every micro-batch",
            issue="none: it exists for the gating patch",
            remove_when="the gating patch goes",
            essential=False,
        )
        for name, path in (
            ("no-pipelining", "forward_backward_no_pipelining"),
            ("pipelining", "forward_backward_pipelining_without_interleaving"),
            ("interleaving", "forward_backward_pipelining_with_interleaving"),
        )
    ),
    Patch(
        id="legacy-wrap-check",
        module="megatron.legacy.model.module",
        path="Float16Module.__init__",
        factory="protect.effect:look_after_wrapping",
        why="0.11's own training wraps with this class; nobody would see whether the routers stayed fp32",
        issue=f"{_ISSUES}/issues/1482",
        remove_when="0.11 is no longer supported",
        parameters=("self", "module"),
    ),
)
