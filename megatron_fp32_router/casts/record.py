"""Patches that keep router tensors out of casts."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from megatron_fp32_router.patching.record import MODULE, ROUTER, UPSTREAM, Patch, deferred

if TYPE_CHECKING:
    from megatron_fp32_router.casts import constructor, router
else:
    constructor, router = deferred(__package__, "constructor"), deferred(__package__, "router")

#: Which parameters and buffers a router has, and that reset_parameters alone casts them at construction.
_CONSTRUCTION: Final = f"{ROUTER}:Router Router.__init__ TopKRouter TopKRouter.__init__ InferenceTopKRouter.__init__"

_patch: Final = partial(Patch, module=ROUTER)

PATCHES: Final = (
    _patch(
        id="router-init",
        path="Router.__init__",
        factory=constructor.initialise_in_fp32,
        why="the router weight is cast to params_dtype as soon as it is initialised",
        issue=f"{UPSTREAM}/pull/683",
        remove_when="Router.__init__ no longer casts (from 0.13 reset_parameters does)",
        repairs=("D12",),
        until="0.13",
        native_where=("Router.__init__ lacks params_dtype",),
        parameters=("config",),
        relies_on=(_CONSTRUCTION,),
        needs=("gating",),
    ),
    _patch(
        id="router-reset",
        path="Router.reset_parameters",
        factory=router.reset_in_fp32,
        why="router weight and bias are cast to params_dtype as soon as they are initialised",
        issue=f"{UPSTREAM}/pull/683",
        remove_when="reset_parameters leaves the router's parameters in fp32",
        repairs=("D12", "D13", "D18"),
        since="0.13",
        absent_where=("Router.__init__ uses params_dtype",),
        # No subclass has a reset_parameters of its own.
        relies_on=(_CONSTRUCTION, f"{ROUTER}:TopKRouter.reset_parameters InferenceTopKRouter.reset_parameters"),
        needs=("gating",),
    ),
    _patch(
        id="router-casts",
        path="TopKRouter._apply",
        factory=router.keep_fp32,
        why="bfloat16(), half() and to(dtype) round the router's weight, biases and token counts",
        issue=f"{UPSTREAM}/issues/1482",
        remove_when="every router tensor carries main's keep_in_fp32 mark (#5929) through device moves",
        repairs=("D1", "D2", "D3", "D4", "D5", "D6", "D7", "D8", "D9", "D10", "D11", "D12", "D13", "D18", "D22"),
        parameters=("fn",),
        relies_on=(
            _CONSTRUCTION,
            # Every cast of a router goes through TopKRouter._apply.
            f"{ROUTER}:Router._apply InferenceTopKRouter._apply InferenceTopKRouter",
            # Whole-model casts are torch's own and reach Module._apply of every child.
            f"{MODULE}:MegatronModule._apply MegatronModule.bfloat16 MegatronModule.half MegatronModule.to "
            "convert_module_to_dtype_except_fp32_marked",
            # Upstream widens expert_bias before it is read, and does nothing to tensors that are fp32.
            f"{ROUTER}:TopKRouter._maintain_float32_expert_bias TopKRouter._load_from_state_dict "
            "TopKRouter._save_to_state_dict",
        ),
        inherited=True,
    ),
)
