"""Patches that compute logits in fp32."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from megatron_fp32_router.patching.record import MOE_UTILS, ROUTER, UPSTREAM, Patch, deferred

if TYPE_CHECKING:
    from megatron_fp32_router.gating import logits, schedule
else:
    logits, schedule = deferred(__package__, "logits"), deferred(__package__, "schedule")

_output: Final = partial(
    Patch,
    module=ROUTER,
    factory=logits.hand_on_upstream_dtype,
    why="fp32 probabilities would reach a dispatcher that expects the model's dtype",
    issue=f"{UPSTREAM}/issues/1421",
    remove_when="the gating patch goes",
    goes_with="gating",
    parameters=("input",),
)

_step: Final = partial(
    Patch,
    module="megatron.core.pipeline_parallel.schedules",
    factory=schedule.keep_splits,
    why="router weights are split again in every micro-batch",
    issue="none: it exists for the gating patch",
    remove_when="the gating patch goes",
    goes_with="gating",
    area="schedules",
    whole=False,
    essential=False,
)

PATCHES: Final = (
    Patch(
        id="gating",
        module=ROUTER,
        path="Router.gating",
        factory=logits.compute_in_fp32,
        why="logits and router gradients are computed in bf16 or TF32, from a weight that is bf16",
        issue=f"{UPSTREAM}/issues/1421",
        remove_when="gating computes fp32 logits from an fp32 weight without TF32",
        repairs=("D14", "D15", "D16", "D17"),
        parameters=("input",),
        relies_on=(
            # No subclass has a gating of its own, and weight is the parameter itself.
            f"{ROUTER}:TopKRouter.gating InferenceTopKRouter.gating Router.weight TopKRouter.weight",
            # Logits are input · weightᵀ + bias, and their gradients those of that product alone.
            f"{MOE_UTILS}:router_gating_linear RouterGatingLinearFunction RouterGatingLinearFunction.forward "
            "RouterGatingLinearFunction.backward",
        ),
        needs=("router-output", "inference-output"),
        supersedes=True,
    ),
    _output(
        id="router-output",
        path="TopKRouter.forward",
        relies_on=(
            # Nothing comes between a call of the router and its forward.
            f"{ROUTER}:Router.__call__ TopKRouter.__call__",
            # Everything between gating and the probabilities takes fp32 logits and keeps their dtype.
            f"{ROUTER}:TopKRouter.routing TopKRouter.apply_input_jitter TopKRouter.apply_z_loss "
            "TopKRouter.sinkhorn_load_balancing TopKRouter.quantile_balancing TopKRouter._hash_routing "
            "TopKRouter.apply_load_balancing_loss TopKRouter.aux_loss_load_balancing "
            "TopKRouter.seq_aux_loss_load_balancing TopKRouter.compute_routing_scores_for_aux_loss "
            "TopKRouter._apply_aux_loss TopKRouter._apply_seq_aux_loss TopKRouter._apply_global_aux_loss "
            "TopKRouter.attach_and_log_load_balancing_loss TopKRouter.is_aux_loss_enabled "
            "TopKRouter.get_aux_loss_coeff",
            # Scores, the choice of experts and auxiliary losses are computed in the dtype of the logits.
            f"{MOE_UTILS}:topk_routing_with_score_function topk_softmax_with_capacity group_limited_topk "
            "compute_routing_scores_for_aux_loss apply_router_token_dropping get_capacity "
            "switch_load_balancing_loss_func sequence_load_balancing_loss_func z_loss_func sinkhorn "
            "qb_dual_update get_tokens_per_expert_and_token_count apply_random_logits RandomSTE.forward "
            "apply_biased_logits RandomSTEShared.forward save_to_aux_losses_tracker "
            "MoEAuxLossAutoScaler.forward MoEAuxLossAutoScaler.backward",
        ),
    ),
    _output(
        id="inference-output",
        path="InferenceTopKRouter._forward",
        since="0.17",
        area="inference",
        absent_where=("InferenceTopKRouter.forward lacks _forward",),
        # Inference goes through _forward or TopKRouter.forward.
        relies_on=(
            f"{ROUTER}:InferenceTopKRouter.forward InferenceTopKRouter._compiled_topk_routing "
            "InferenceTopKRouter.routing",
        ),
    ),
    *(
        _step(id=f"step-{name}", path=path, uses=(f"{path} uses finalize_model_grads_func", f"{path} lacks step"))
        for name, path in (
            ("no-pipelining", "forward_backward_no_pipelining"),
            ("pipelining", "forward_backward_pipelining_without_interleaving"),
            ("interleaving", "forward_backward_pipelining_with_interleaving"),
        )
    ),
)
