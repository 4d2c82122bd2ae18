"""The distributed optimizer: its groups, and its checkpoints in every format."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from megatron_fp32_router.patching.record import DISTRIBUTED_OPTIMIZER, UPSTREAM, Patch, deferred

if TYPE_CHECKING:
    from megatron_fp32_router.optimizers.distributed import refusal, repair, resume
else:
    repair, refusal, resume = (deferred(__package__, name) for name in ("repair", "refusal", "resume"))

_DIST_CHECKPOINTING: Final = "megatron.core.dist_checkpointing"

_patch: Final = partial(
    Patch, module=DISTRIBUTED_OPTIMIZER, issue=f"{UPSTREAM}/issues/2777", goes_with="router-casts", area="distributed"
)

_checkpoint: Final = partial(
    _patch,
    factory=refusal.refuse_stale_numbering,
    why="with fp32 router parameters, optimizer checkpoints silently hold another parameter's state",
    remove_when="the index map follows the groups (#5835)",
    whole=False,
    relies_on=(
        # model_param_group_index_map numbers parameters in gradient-buffer order, groups hold fp32 ones first.
        f"{DISTRIBUTED_OPTIMIZER}:DistributedOptimizer._build_model_and_main_param_groups "
        "DistributedOptimizer._build_optimizer_group_ranges "
        "DistributedOptimizer._get_main_param_and_optimizer_states "
        "DistributedOptimizer._set_main_param_and_optimizer_states",
    ),
)

_load: Final = partial(
    _patch,
    path="load",
    factory=resume.load_across_settings,
    why="a checkpoint of a run without the plugin stops with an opaque error, or after the model was overwritten",
    remove_when="optimizer state is stored by parameter name in every format",
    area="torch_dist",
    parameters=("sharded_state_dict", "checkpoint_dir"),
)

PATCHES: Final = (
    _patch(
        id="optimizer-mixed-groups",
        path="DistributedOptimizer.__init__",
        factory=repair.repair_mixed_groups,
        why="with fp32 router parameters, optimizer checkpoints silently hold another parameter's state, or fail",
        remove_when="the index map follows the groups and fp32 shards are detached (#5835); status() then says native",
        parameters=("optimizer", "config"),
    ),
    _checkpoint(id="optimizer-checkpoint", path="DistributedOptimizer.sharded_state_dict"),
    _checkpoint(id="optimizer-checkpoint-legacy", path="DistributedOptimizer.get_parameter_state_dp_zero"),
    _patch(
        id="optimizer-misplaced-state",
        path="DistributedOptimizer.sharded_param_state_fully_reshardable",
        factory=refusal.refuse_misplaced_state,
        why="the format that allows to turn the plugin on and off saves wrong state behind a padded bucket",
        issue=f"{UPSTREAM}/pull/5077",
        remove_when="padding between buckets is accounted for (#5077)",
        since="0.15",
        absent_where=("DistributedOptimizer.sharded_state_dict lacks sharded_param_state_fully_reshardable",),
        native_where=("DistributedOptimizer.sharded_param_state_fully_reshardable uses cumulative_padding_stripped",),
        parameters=("model_sharded_state_dict", "is_loading"),
    ),
    _patch(
        id="optimizer-load-legacy",
        path="DistributedOptimizer.load_parameter_state_from_dp_zero",
        factory=resume.load_gathered_across_settings,
        why="a checkpoint of a run without the plugin stops one rank with an opaque error while the others wait",
        remove_when="formats that gather a buffer's state go",
        parameters=("state_dict",),
        relies_on=(f"{DISTRIBUTED_OPTIMIZER}:DistributedOptimizer.get_parameter_state_dp_zero",),
    ),
    _patch(
        id="optimizer-load-by-buffer",
        path="DistributedOptimizer.sharded_param_state_dp_reshardable",
        factory=resume.note_who_asks,
        why="a checkpoint of a run without the plugin stops with an opaque error",
        remove_when="dp_reshardable goes",
        since="0.15",
        absent_where=("DistributedOptimizer.sharded_state_dict lacks sharded_param_state_dp_reshardable",),
        parameters=("model_sharded_state_dict", "is_loading"),
        relies_on=(
            f"{DISTRIBUTED_OPTIMIZER}:DistributedOptimizer.get_parameter_state_dp_reshardable "
            "DistributedOptimizer.load_parameter_state_from_dp_reshardable",
        ),
    ),
    _patch(
        id="optimizer-load-apart",
        path="DistributedOptimizer.sharded_param_state_fs_model_space",
        factory=resume.read_apart_from_the_model,
        why="a resume from a run without the plugin may take the router weight that was rounded to bf16",
        issue=f"{UPSTREAM}/pull/5835",
        remove_when="fully_sharded_model_space goes",
        parameters=("model_sharded_state_dict", "is_loading"),
    ),
    _patch(
        id="optimizer-load-spread",
        path="DistributedOptimizer.load_state_dict",
        factory=resume.spread_loaded_weights,
        why="after a resume from a run without the plugin, ranks run their first forward with different router weights",
        issue=f"{UPSTREAM}/pull/5835",
        remove_when="loading gathers fp32 parameters",
        parameters=("state_dict",),
    ),
    _load(id="checkpoint-load", module=f"{_DIST_CHECKPOINTING}.serialization", whole=False),
    _load(id="checkpoint-load-in-package", module=_DIST_CHECKPOINTING),
)
