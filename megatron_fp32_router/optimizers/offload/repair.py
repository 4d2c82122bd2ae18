"""CPU offload of the optimizer (HybridDeviceOptimizer, 0.12 and later) with native fp32 parameters.

It gives every bf16 parameter an fp32 copy and works on those copies. A parameter that is fp32 already has none, and
is forgotten: upstream never hands its gradient on while it stays on the GPU, fails to load its state, and does not
refresh its copy on the CPU when the model was loaded without optimizer state. All of this does nothing where there
are no native fp32 parameters. That HybridDeviceOptimizer takes their shards at all (NVIDIA/Megatron-LM #6212) is due to
optimizers/distributed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_fp32_router.patching.registry import replaces


def hand_on_gradients(original: Callable[..., None]) -> Callable[..., None]:
    """HybridDeviceOptimizer._set_sub_optimizer_grads: also for fp32 parameters that stay on the GPU.

    Megatron leaves every gradient in `decoupled_grad`. Upstream hands it on to fp32 copies and to the CPU's
    parameters only, so the GPU's optimizer sees a native fp32 parameter without a gradient and skips it. No copy is
    made where the gradient is fp32.
    """

    @replaces(original)
    def _set_sub_optimizer_grads(self: Any) -> None:
        if self.gpu_optimizer is not None:
            for group in self.gpu_optimizer.param_groups:
                for param in group["params"]:
                    if self.inner_param_to_orig_param[param] is param and hasattr(param, "decoupled_grad"):
                        grad = param.decoupled_grad
                        param.grad = None if grad is None else grad.to(param.dtype)
        original(self)

    return _set_sub_optimizer_grads


def _native(optimizer: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(parameter, what the sub-optimizers hold of it) of every parameter without an fp32 copy."""
    return [
        (param, inner)
        for param, inner in optimizer.param_to_inner_param.items()
        if param not in optimizer.param_to_fp32_param
    ]


def load_native(original: Callable[..., None]) -> Callable[..., None]:
    """HybridDeviceOptimizer._update_fp32_params_by_new_state: a native fp32 parameter is its own main copy.

    Upstream looks for its fp32 copy and fails. What was saved as main copy goes into the parameter itself: after a
    run with bf16 routers that is the exact weight, where the model's own was rounded.
    """

    @replaces(original)
    def _update_fp32_params_by_new_state(self: Any) -> None:
        native = _native(self) if self.param_update_in_fp32 else []
        for param, inner in native:
            master = self.state[param].get("master_param") if param in self.state else None
            if master is not None and master is not inner:
                inner.data.copy_(master)
                if inner is not param:
                    param.data.copy_(master)
        everything = self.state
        without = {param for param, _ in native}
        self.state = {param: state for param, state in everything.items() if param not in without}
        try:
            original(self)
        finally:
            self.state = everything

    return _update_fp32_params_by_new_state


def refresh_native(original: Callable[..., None]) -> Callable[..., None]:
    """HybridDeviceOptimizer.update_fp32_param_by_new_param (0.13 and later): fp32 parameters that lie on the CPU too.

    It runs when a model was loaded without optimizer state. Without this the next step would write the weights from
    before the load back into the model.
    """

    @replaces(original)
    def update_fp32_param_by_new_param(self: Any) -> None:
        original(self)
        for param, inner in _native(self):
            if inner is not param:
                inner.data.copy_(param)

    return update_fp32_param_by_new_param
