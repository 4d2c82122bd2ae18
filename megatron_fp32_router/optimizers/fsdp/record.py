"""FSDP: torch's and Megatron's."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from megatron_fp32_router.patching.record import OPTIMIZER, UPSTREAM, Patch, deferred

if TYPE_CHECKING:
    from megatron_fp32_router.optimizers.fsdp import refusal, repair
else:
    refusal, repair = (deferred(__package__, name) for name in ("refusal", "repair"))

_DISTRIBUTED: Final = "megatron.core.distributed"

_patch: Final = partial(Patch, goes_with="router-casts", area="fsdp", whole=False)

_megatron: Final = partial(
    _patch,
    parameters=("self", "config"),
    factory=refusal.refuse_megatron_fsdp,
    why="nobody has run fp32 router parameters in it on a GPU, or resumed it",
    issue=f"{UPSTREAM}/pull/5929",
    remove_when="it has been run and resumed on a GPU",
)

#: From 0.20 FullyShardedDataParallel is a function that picks one of two classes.
_adapter: Final = partial(_megatron, module=f"{_DISTRIBUTED}.fsdp.mcore_fsdp_adapter")
_versioned: Final = partial(_adapter, since="0.20", absent_where=("FullyShardedDataParallel.__init__ uses self",))

PATCHES: Final = (
    _patch(
        id="fsdp2-units",
        module=f"{_DISTRIBUTED}.torch_fully_sharded_data_parallel",
        path="TorchFullyShardedDataParallel.__init__",
        factory=repair.shard_routers_apart,
        why="torch FSDP2 stops at fp32 router parameters in the first forward",
        issue="https://github.com/pytorch/pytorch",
        remove_when="FSDP2 takes several parameter dtypes in one unit",
        parameters=("self", "config"),
        uses=("TorchFullyShardedDataParallel.__init__ uses fully_shard",),
    ),
    _patch(
        id="fsdp2-gradients",
        module=OPTIMIZER,
        path="Float16OptimizerWithFloat16Params._copy_model_grads_to_main_grads",
        factory=repair.lend_gradients,
        why="under torch FSDP2 the optimizer stops at fp32 router parameters, which have no main_grad there",
        issue=f"{UPSTREAM}/pull/5929",
        remove_when="the gradient of an fp32 parameter without main_grad is taken from grad",
        parameters=("self",),
    ),
    _megatron(
        id="refuse-custom-fsdp",
        module=f"{_DISTRIBUTED}.custom_fsdp.fully_sharded_data_parallel",
        path="FullyShardedDataParallel.__init__",
        since="0.12",
        until="0.14",
        gone=True,
    ),
    _adapter(
        id="refuse-megatron-fsdp",
        path="FullyShardedDataParallel.__init__",
        since="0.14",
        until="0.20",
        gone=True,
        absent_where=("FullyShardedDataParallelV1.__init__ uses self",),
    ),
    _versioned(id="refuse-megatron-fsdp-v1", path="FullyShardedDataParallelV1.__init__"),
    _versioned(id="refuse-megatron-fsdp-v2", path="FullyShardedDataParallelV2.__init__"),
)
