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
_OPTIMIZER: Final = "megatron.core.optimizer.optimizer"
_DISTRIBUTED_OPTIMIZER: Final = "megatron.core.optimizer.distrib_optimizer"
_DIST_CHECKPOINTING: Final = "megatron.core.dist_checkpointing"
_HYBRID_OPTIMIZER: Final = "megatron.core.optimizer.cpu_offloading.hybrid_optimizer"
_OPTIMIZERS: Final = "megatron.core.optimizer"
_DISTRIBUTED: Final = "megatron.core.distributed"
_DDP: Final = "megatron.core.distributed.distributed_data_parallel"
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
        needs: ids of patches of the same module without which this one does harm: under on_mismatch="warn" it is
            left out with them.
        supersedes: whether the replacement works without the original. Somebody else's function in the target's place
            is then left there, as it would be if it had come after ours.
        monitor: installed only where MEGATRON_FP32_ROUTER_MONITOR asks for looks.
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
    needs: tuple[str, ...] = ()
    supersedes: bool = False
    monitor: bool = False
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
        needs=("gating",),
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
        needs=("gating",),
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
        needs=("gating",),
    ),
    Patch(
        id="gating",
        module=_ROUTER,
        path="Router.gating",
        factory="protect.gating:compute_in_fp32",
        why="logits and router gradients are computed in bf16 or TF32, from a weight that is bf16",
        issue=f"{_ISSUES}/issues/1421",
        remove_when="gating computes fp32 logits from an fp32 weight without TF32",
        parameters=("self", "input"),
        needs=("router-output", "inference-output"),
        supersedes=True,
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
        supersedes=True,
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
        supersedes=True,
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
        supersedes=True,
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
        supersedes=True,
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
        id="ranks-speak",
        module=_DDP,
        path="DistributedDataParallel.__init__",
        factory="protect.agreement:publish_when_wrapping",
        why="a rank without the plugin would be noticed by nobody",
        issue=f"{_ISSUES}/issues/1482",
        remove_when="router-casts goes",
        parameters=("self", "config", "ddp_config", "module"),
    ),
    Patch(
        id="ranks-agree-before-broadcast",
        module=_DDP,
        path="DistributedDataParallel.broadcast_params",
        factory="protect.agreement:agree_first",
        why="parameters of different dtypes would be broadcast into each other where a rank lacks the plugin",
        issue=f"{_ISSUES}/issues/1482",
        remove_when="router-casts goes",
        parameters=("self",),
    ),
    Patch(
        id="ranks-agree",
        module=_OPTIMIZER,
        path="MegatronOptimizer.__init__",
        factory="protect.agreement:agree_first",
        why="the first step would hang or mix up gradients where a rank lacks the plugin",
        issue=f"{_ISSUES}/issues/1482",
        remove_when="router-casts goes",
        parameters=("self", "optimizer", "config"),
    ),
    Patch(
        id="bucket-groups",
        module=_DDP,
        path="partition_buckets",
        factory="optim.buckets:fp32_in_groups_of_their_own",
        why="in a virtual pipeline, fp32 and bf16 tensors share one coalesced collective: an error, or garbage weights",
        issue="not reported upstream",
        remove_when="groups of buckets are cut by dtype",
        parameters=("buffers", "force_single_bucket_group"),
    ),
    Patch(
        id="optimizer-mixed-groups",
        module=_DISTRIBUTED_OPTIMIZER,
        path="DistributedOptimizer.__init__",
        factory="optim.distributed:repair_mixed_groups",
        why="with fp32 router parameters, optimizer checkpoints silently hold another parameter's state, or fail",
        issue=f"{_ISSUES}/issues/2777",
        remove_when="the index map follows the groups and fp32 shards are detached (#5835); status() then says native",
        parameters=("self", "optimizer", "config"),
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
        id="optimizer-misplaced-state",
        module=_DISTRIBUTED_OPTIMIZER,
        path="DistributedOptimizer.sharded_param_state_fully_reshardable",
        factory="optim.distributed:refuse_misplaced_state",
        why="the format that allows to turn the plugin on and off saves wrong state behind a padded bucket",
        issue=f"{_ISSUES}/pull/5077",
        remove_when="padding between buckets is accounted for (#5077)",
        since="0.15",
        parameters=("self", "model_sharded_state_dict", "is_loading"),
    ),
    Patch(
        id="optimizer-load-legacy",
        module=_DISTRIBUTED_OPTIMIZER,
        path="DistributedOptimizer.load_parameter_state_from_dp_zero",
        factory="optim.resume:refuse_other_buffers_legacy",
        why="a checkpoint of a run without the plugin stops one rank with an opaque error while the others wait",
        issue=f"{_ISSUES}/issues/2777",
        remove_when="the legacy format goes",
        parameters=("self", "state_dict"),
    ),
    Patch(
        id="optimizer-load-apart",
        module=_DISTRIBUTED_OPTIMIZER,
        path="DistributedOptimizer.sharded_param_state_fs_model_space",
        factory="optim.resume:read_apart_from_the_model",
        why="a resume from a run without the plugin may take the router weight that was rounded to bf16",
        issue=f"{_ISSUES}/pull/5835",
        remove_when="fully_sharded_model_space goes",
        parameters=("self", "model_sharded_state_dict", "is_loading"),
    ),
    Patch(
        id="optimizer-load-spread",
        module=_DISTRIBUTED_OPTIMIZER,
        path="DistributedOptimizer.load_state_dict",
        factory="optim.resume:spread_loaded_weights",
        why="after a resume from a run without the plugin, ranks run their first forward with different router weights",
        issue=f"{_ISSUES}/pull/5835",
        remove_when="loading gathers fp32 parameters",
        parameters=("self", "state_dict"),
    ),
    Patch(
        id="checkpoint-load",
        module=f"{_DIST_CHECKPOINTING}.serialization",
        path="load",
        factory="optim.resume:refuse_other_buffers",
        why="a checkpoint of a run without the plugin stops with an opaque error, or after the model was overwritten",
        issue=f"{_ISSUES}/issues/2777",
        remove_when="optimizer state is stored by parameter name in every format",
        parameters=("sharded_state_dict", "checkpoint_dir"),
    ),
    Patch(
        id="checkpoint-load-in-package",
        module=_DIST_CHECKPOINTING,
        path="load",
        factory="optim.resume:refuse_other_buffers",
        why="a checkpoint of a run without the plugin stops with an opaque error, or after the model was overwritten",
        issue=f"{_ISSUES}/issues/2777",
        remove_when="optimizer state is stored by parameter name in every format",
        parameters=("sharded_state_dict", "checkpoint_dir"),
    ),
    Patch(
        id="float16-state",
        module=_OPTIMIZER,
        path="Float16OptimizerWithFloat16Params.state_dict",
        factory="optim.float16:state_with_every_main_copy",
        why="with fp32 router parameters, main copies are saved and loaded as another parameter's, or not at all",
        issue=f"{_ISSUES}/pull/5929",
        remove_when="fp32 parameters have an fp32_param in checkpoints too, to turn the plugin on and off",
        parameters=("self",),
    ),
    Patch(
        id="float16-sharded-state",
        module=_OPTIMIZER,
        path="Float16OptimizerWithFloat16Params.sharded_state_dict",
        factory="optim.float16:sharded_state_with_every_main_copy",
        why="with fp32 router parameters, main copies are saved and loaded as another parameter's, or not at all",
        issue=f"{_ISSUES}/pull/5929",
        remove_when="fp32 parameters have an fp32_param in checkpoints too, to turn the plugin on and off",
        parameters=("self", "model_sharded_state_dict", "is_loading"),
    ),
    Patch(
        id="float16-load",
        module=_OPTIMIZER,
        path="Float16OptimizerWithFloat16Params.load_state_dict",
        factory="optim.float16:load_every_main_copy",
        why="with fp32 router parameters, main copies are saved and loaded as another parameter's, or not at all",
        issue=f"{_ISSUES}/pull/5929",
        remove_when="fp32 parameters have an fp32_param in checkpoints too, to turn the plugin on and off",
        parameters=("self", "state_dict"),
    ),
    Patch(
        id="offload-gradients",
        module=_HYBRID_OPTIMIZER,
        path="HybridDeviceOptimizer._set_sub_optimizer_grads",
        factory="optim.offload:hand_on_gradients",
        why="with CPU offload, fp32 router parameters that stay on the GPU are silently never updated",
        issue=f"{_ISSUES}/issues/6212",
        remove_when="decoupled_grad reaches GPU parameters that have no fp32 copy",
        since="0.12",
        parameters=("self",),
    ),
    Patch(
        id="offload-load",
        module=_HYBRID_OPTIMIZER,
        path="HybridDeviceOptimizer._update_fp32_params_by_new_state",
        factory="optim.offload:load_native",
        why="with CPU offload, loading the state of fp32 router parameters fails, or leaves out their main copy",
        issue=f"{_ISSUES}/pull/5929",
        remove_when="a loaded main copy reaches parameters that have no fp32 copy (#5929 only skips them)",
        since="0.12",
        parameters=("self",),
    ),
    Patch(
        id="offload-reload",
        module=_HYBRID_OPTIMIZER,
        path="HybridDeviceOptimizer.update_fp32_param_by_new_param",
        factory="optim.offload:refresh_native",
        why="with CPU offload, a model loaded without optimizer state gets its old router weights back",
        issue=f"{_ISSUES}/issues/6212",
        remove_when="update_fp32_param_by_new_param refreshes the CPU copies of fp32 parameters",
        since="0.13",
        parameters=("self",),
    ),
    Patch(
        id="refuse-optimizers",
        module=_OPTIMIZER,
        path="MixedPrecisionOptimizer.__init__",
        factory="optim.refusals:look_at_configuration",
        why="with fp32 router parameters, the precision-aware optimizer saves wrong weights and clips by a wrong norm",
        issue=f"{_ISSUES}/issues/7338",
        remove_when="the precision-aware optimizer handles fp32 parameters, and Muon has been tested",
        parameters=("self", "optimizer", "config"),
    ),
    Patch(
        id="refuse-layer-wise",
        module=f"{_OPTIMIZERS}.layer_wise_optimizer",
        path="LayerWiseDistributedOptimizer.__init__",
        factory="optim.refusals:look_at_layer_wise",
        why="the layer-wise optimizer gathers fp32 router parameters as if they were bf16",
        issue=f"{_ISSUES}/issues/5470",
        remove_when="parameters are gathered by dtype",
        since="0.16",
        parameters=("self", "optimizers"),
    ),
    Patch(
        id="refuse-fsdp2",
        module=f"{_DISTRIBUTED}.torch_fully_sharded_data_parallel",
        path="TorchFullyShardedDataParallel.__init__",
        factory="optim.refusals:look_at_fsdp2",
        why="torch FSDP2 stops at fp32 router parameters in the first forward",
        issue="https://github.com/pytorch/pytorch",
        remove_when="FSDP2 takes several parameter dtypes in one unit",
        parameters=("self", "config"),
    ),
    Patch(
        id="refuse-custom-fsdp",
        module=f"{_DISTRIBUTED}.custom_fsdp.fully_sharded_data_parallel",
        path="FullyShardedDataParallel.__init__",
        factory="optim.refusals:look_at_megatron_fsdp",
        why="nobody has run fp32 router parameters in it",
        issue=f"{_ISSUES}/pull/5929",
        remove_when="0.13 is no longer supported",
        since="0.12",
        until="0.14",
        parameters=("self", "config"),
    ),
    Patch(
        id="refuse-megatron-fsdp",
        module=f"{_DISTRIBUTED}.fsdp.mcore_fsdp_adapter",
        path="FullyShardedDataParallel.__init__",
        factory="optim.refusals:look_at_megatron_fsdp",
        why="nobody has run fp32 router parameters in it",
        issue=f"{_ISSUES}/pull/5929",
        remove_when="it has been run on a GPU",
        since="0.14",
        until="0.20",
        parameters=("self", "config"),
    ),
    Patch(
        id="refuse-megatron-fsdp-v1",
        module=f"{_DISTRIBUTED}.fsdp.mcore_fsdp_adapter",
        path="FullyShardedDataParallelV1.__init__",
        factory="optim.refusals:look_at_megatron_fsdp",
        why="nobody has run fp32 router parameters in it",
        issue=f"{_ISSUES}/pull/5929",
        remove_when="it has been run on a GPU",
        since="0.20",
        parameters=("self", "config"),
    ),
    Patch(
        id="refuse-megatron-fsdp-v2",
        module=f"{_DISTRIBUTED}.fsdp.mcore_fsdp_adapter",
        path="FullyShardedDataParallelV2.__init__",
        factory="optim.refusals:look_at_megatron_fsdp",
        why="nobody has run fp32 router parameters in it",
        issue=f"{_ISSUES}/pull/5929",
        remove_when="it has been run on a GPU",
        since="0.20",
        parameters=("self", "config"),
    ),
    Patch(
        id="refit-dtypes",
        module="megatron.core.resharding.planner",
        path="select_src_metadata_balanced",
        factory="optim.refusals:compare_dtypes",
        why="refit would copy an fp32 router weight's bytes into a bf16 one",
        issue=f"{_ISSUES}/pull/4580",
        remove_when="refit converts dtypes of parameters",
        since="0.16",
        parameters=("src_meta_list", "dst_metadata", "dst_rank"),
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
    Patch(
        id="monitor-step",
        module=_FINALIZE,
        path="_allreduce_conditional_embedding_grads",
        factory="monitor.watch:look_at_steps",
        why="the monitor would not know when a step's gradients are there",
        issue=f"{_ISSUES}/issues/2398",
        remove_when="the monitor goes; the target is only a place that every finalize_model_grads passes once",
        parameters=("model", "config"),
        monitor=True,
    ),
    Patch(
        id="monitor-optimizer",
        module=_OPTIMIZER,
        path="MegatronOptimizer.__init__",
        factory="monitor.contract:remember_optimizer",
        why="the monitor could not say what dtype main copies and moments have",
        issue=f"{_ISSUES}/issues/2777",
        remove_when="the monitor goes",
        parameters=("self", "optimizer", "config"),
        monitor=True,
    ),
)
