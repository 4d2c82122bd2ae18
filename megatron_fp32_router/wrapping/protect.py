"""protect_model(): a model that was built before the plugin was active. Imported only when it is called."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch

from megatron_fp32_router.casts.router import below_fp32, mark_parameters, protects_parameters, widen_counter
from megatron_fp32_router.errors import ModelInUseError
from megatron_fp32_router.log import say
from megatron_fp32_router.wrapping.survey import Survey, protected_in, survey


def protect_model(model: Any) -> Survey:
    """See megatron_fp32_router.protect_model."""
    total = Survey(0, {}, (), ())
    chunks = model if isinstance(model, (list, tuple)) else [model]
    routers = [router for chunk in chunks for _, router in protected_in(chunk)]
    if any(hasattr(parameter, "main_grad") for router in routers for parameter in router.parameters()):
        raise ModelInUseError(
            "protect_model() came after DDP: the parameters are views of its buffers now. "
            "Call it on the bare or Float16Module-wrapped model, before DDP and the optimizer."
        )
    for router in routers:
        _widen(router)
    for chunk in chunks:
        found = survey(chunk)
        dtypes = Counter(total.dtypes)
        dtypes.update(found.dtypes)
        total = Survey(
            total.routers + found.routers,
            dict(dtypes),
            total.below + found.below,
            total.foreign + found.foreign,
        )
    say(logging.WARNING, f"protect_model: {total}. Bits that were lost before this call stay lost.")
    return total


def _widen(router: torch.nn.Module) -> None:
    """Bring every protected tensor of `router` to fp32, in place; Parameter objects stay the same."""
    with torch.no_grad():
        for module in router.modules():
            if protects_parameters():
                for parameter in module._parameters.values():
                    if parameter is not None and below_fp32(parameter.dtype):
                        parameter.data = parameter.data.to(torch.float32)
                        if parameter.grad is not None:
                            parameter.grad = parameter.grad.to(torch.float32)
            for name, buffer in module._buffers.items():
                if buffer is not None and below_fp32(buffer.dtype):
                    module._buffers[name] = buffer.to(torch.float32)
    mark_parameters(router)
    widen_counter(router)
