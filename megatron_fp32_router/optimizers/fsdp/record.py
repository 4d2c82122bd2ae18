"""FSDP: torch's and Megatron's."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from megatron_fp32_router.patching.record import DISTRIBUTED_OPTIMIZER, OPTIMIZER, UPSTREAM, Patch, deferred

if TYPE_CHECKING:
    from megatron_fp32_router.optimizers.fsdp import refusal, repair
else:
    refusal, repair = (deferred(__package__, name) for name in ("refusal", "repair"))

_DISTRIBUTED: Final = "megatron.core.distributed"

_CUSTOM: Final = f"{_DISTRIBUTED}.custom_fsdp.fully_sharded_data_parallel"
#: From 0.20 FullyShardedDataParallel is a function that picks one of two classes.
_ONE_CLASS: Final = "FullyShardedDataParallel.__init__ uses self"
#: From 0.16, and on main, where there is no FullyShardedDataParallel.__init__ any more.
_SAVES: Final = f"{DISTRIBUTED_OPTIMIZER}:DistributedOptimizer._param_name uses handle_experts_in_state_dict"

_patch: Final = partial(Patch, goes_with="router-casts", area="fsdp", whole=False, issue=f"{UPSTREAM}/pull/5929")

#: Before 0.16, and main's second version. What upstream does there with a CPU: docs/limits.md.
_untested: Final = partial(
    _patch,
    module=f"{_DISTRIBUTED}.fsdp.mcore_fsdp_adapter",
    path="FullyShardedDataParallel.__init__",
    factory=refusal.refuse_megatron_fsdp,
    why="fp32 router parameters train in a Megatron-FSDP that no test has resumed from a checkpoint",
    remove_when="upstream can save it on a CPU",
)

PATCHES: Final = (
    _patch(
        id="fsdp2-units",
        module=f"{_DISTRIBUTED}.torch_fully_sharded_data_parallel",
        path="TorchFullyShardedDataParallel.__init__",
        factory=repair.shard_routers_apart,
        why="torch FSDP2 stops at fp32 router parameters in the first forward",
        remove_when="FSDP2 takes several parameter dtypes in one unit",
        parameters=("config",),
        uses=("TorchFullyShardedDataParallel.__init__ uses fully_shard",),
    ),
    _patch(
        id="fsdp2-gradients",
        module=OPTIMIZER,
        path="Float16OptimizerWithFloat16Params._copy_model_grads_to_main_grads",
        factory=repair.lend_gradients,
        why="under torch FSDP2 the optimizer stops at fp32 router parameters, which have no main_grad there",
        remove_when="the gradient of an fp32 parameter without main_grad is taken from grad",
    ),
    _patch(
        id="megatron-fsdp-main-copies",
        module=f"{_DISTRIBUTED}.fsdp.src.megatron_fsdp.megatron_fsdp",
        path="MegatronFSDP.__init__",
        factory=refusal.refuse_low_main_copies,
        why="with --megatron-fsdp-main-params-dtype below fp32 a router's fp32 weight is rounded in every step",
        remove_when="it keeps the main copy of an fp32 parameter in fp32, whatever the flag",
        since="0.17",
        native_where=("MegatronFSDP.__init__ lacks mixed_precision_policy",),
    ),
    _untested(id="refuse-custom-fsdp", module=_CUSTOM, since="0.12", until="0.14", gone=True),
    _untested(id="refuse-megatron-fsdp", since="0.14", until="0.16", absent_where=(_SAVES,), native_where=(_SAVES,)),
    _untested(
        id="refuse-megatron-fsdp-v2",
        path="FullyShardedDataParallelV2.__init__",
        since="0.20",
        absent_where=(_ONE_CLASS,),
    ),
)
