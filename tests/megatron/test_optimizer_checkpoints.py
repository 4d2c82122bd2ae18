"""Optimizer checkpoints with fp32 router parameters: refused where upstream would mix up parameters."""

from __future__ import annotations

from typing import Any

import pytest

import megatron_fp32_router


def distributed_optimizer(room: Any) -> Any:
    """The one that holds the routers' parameters."""
    optimizers = getattr(room.optimizer, "chained_optimizers", [room.optimizer])
    routers = {id(p) for _, router in room.routers() for p in router.parameters()}
    return next(o for o in optimizers if any(id(p) in routers for p in o.model_param_group_index_map))


@pytest.mark.parametrize("entry", ["sharded_state_dict", "get_parameter_state_dp_zero"])
def test_mixed_up_optimizer_state_is_neither_saved_nor_loaded(entry: str, build: Any, plugin: Any) -> None:
    optimizer = distributed_optimizer(build(optimizer="distributed"))
    with pytest.raises(megatron_fp32_router.CheckpointRefusedError, match="MEGATRON_FP32_ROUTER_PROTECT=buffers"):
        getattr(optimizer, entry)(*([{}] if entry == "sharded_state_dict" else []))


def test_buffers_mode_saves_what_upstream_saves(build: Any, plugin: Any) -> None:
    plugin(protect="buffers")
    room = build(optimizer="distributed", fused_adam=True)
    from megatron_fp32_router import lab

    room.step(lab.text_batches(room.recipe, seed=1))
    assert distributed_optimizer(room).get_parameter_state_dp_zero()
