"""CPU offload: HybridDeviceOptimizer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from megatron_fp32_router.patching.record import DISTRIBUTED_OPTIMIZER, OPTIMIZERS, UPSTREAM, Patch, deferred

if TYPE_CHECKING:
    from megatron_fp32_router.optimizers.offload import repair
else:
    repair = deferred(__package__, "repair")

_patch: Final = partial(
    Patch,
    module=f"{OPTIMIZERS}.cpu_offloading.hybrid_optimizer",
    issue=f"{UPSTREAM}/issues/6212",
    goes_with="router-casts",
    since="0.12",
    area="offload",
)

PATCHES: Final = (
    _patch(
        id="offload-gradients",
        path="HybridDeviceOptimizer._set_sub_optimizer_grads",
        factory=repair.hand_on_gradients,
        why="with CPU offload, fp32 router parameters that stay on the GPU are silently never updated",
        remove_when="decoupled_grad reaches GPU parameters that have no fp32 copy",
    ),
    _patch(
        id="offload-load",
        path="HybridDeviceOptimizer._update_fp32_params_by_new_state",
        factory=repair.load_native,
        why="with CPU offload, loading the state of fp32 router parameters fails, or leaves out their main copy",
        issue=f"{UPSTREAM}/pull/5929",
        remove_when="a loaded main copy reaches parameters that have no fp32 copy (#5929 only skips them)",
    ),
    _patch(
        id="offload-reload",
        path="HybridDeviceOptimizer.update_fp32_param_by_new_param",
        factory=repair.refresh_native,
        why="with CPU offload, a model loaded without optimizer state gets its old router weights back",
        remove_when="update_fp32_param_by_new_param refreshes the CPU copies of fp32 parameters",
        since="0.13",
        absent_where=(
            f"{DISTRIBUTED_OPTIMIZER}:DistributedOptimizer._copy_model_params_to_main_params "
            "lacks update_fp32_param_by_new_param",
        ),
    ),
)
