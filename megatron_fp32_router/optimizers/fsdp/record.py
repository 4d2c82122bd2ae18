"""FSDP: torch's and Megatron's."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from megatron_fp32_router.patching.record import UPSTREAM, Patch, deferred

if TYPE_CHECKING:
    from megatron_fp32_router.optimizers.fsdp import refusal
else:
    refusal = deferred(__package__, "refusal")

_DISTRIBUTED: Final = "megatron.core.distributed"

_patch: Final = partial(Patch, goes_with="router-casts", area="fsdp", whole=False, parameters=("self", "config"))

_megatron: Final = partial(
    _patch,
    factory=refusal.look_at_megatron_fsdp,
    why="nobody has run fp32 router parameters in it",
    issue=f"{UPSTREAM}/pull/5929",
    remove_when="it has been run on a GPU",
)

#: From 0.20 FullyShardedDataParallel is a function that picks one of two classes.
_adapter: Final = partial(_megatron, module=f"{_DISTRIBUTED}.fsdp.mcore_fsdp_adapter")
_versioned: Final = partial(_adapter, since="0.20", absent_where=("FullyShardedDataParallel.__init__ uses self",))

PATCHES: Final = (
    _patch(
        id="refuse-fsdp2",
        module=f"{_DISTRIBUTED}.torch_fully_sharded_data_parallel",
        path="TorchFullyShardedDataParallel.__init__",
        factory=refusal.look_at_fsdp2,
        why="torch FSDP2 stops at fp32 router parameters in the first forward",
        issue="https://github.com/pytorch/pytorch",
        remove_when="FSDP2 takes several parameter dtypes in one unit",
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
