"""Casts: floating-point tensors of a TopKRouter stay out of bfloat16(), half() and to(dtype), bit for bit.

No value ever passes through a lower precision: where a cast would demote a tensor, only its device move is redone,
from the original. Not touched: casts of single tensors outside Module._apply (exporters, state-dict copies).
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable
from typing import Any, Final

import torch

from megatron_fp32_router.patching.registry import KEPT, registry, replaces

#: The counter that integers, and by third parties floats, are added to: float64 takes both and is exact to 2^53.
#: Its companions `global_tokens_per_expert` and `ga_steps` stay fp32, because fused kernels take no float64.
COUNTER: Final = "local_tokens_per_expert"

#: Router -> its name in the model that was wrapped, and its tensors that were fp32 then.
wrapped: Final[weakref.WeakKeyDictionary[Any, tuple[str, dict[str, weakref.ref[torch.Tensor]]]]] = (
    weakref.WeakKeyDictionary()
)


def is_protected(parameter: torch.Tensor) -> bool:
    """Whether this is a router's parameter that the plugin keeps in fp32."""
    return parameter.dtype == torch.float32 and getattr(parameter, KEPT, False)


def below_fp32(dtype: torch.dtype) -> bool:
    """Whether `dtype` is a floating-point type with fewer bits than fp32."""
    return dtype.is_floating_point and dtype.itemsize < 4


def is_router(module: Any) -> bool:
    """Whether this is a router that the plugin protects.

    Asked of the module as it is now: the function that we wrap may be somebody else's, with other globals.
    """
    upstream = sys.modules.get("megatron.core.transformer.moe.router")
    kinds = (upstream.TopKRouter,) if upstream is not None else ()
    return isinstance(module, (*kinds, *registry.router_classes))


def protects_parameters() -> bool:
    """Whether weight and bias are protected (protect="all").

    They are not where gating could not be patched and the user chose to go on: upstream's own gating may not take an
    fp32 weight beside a bf16 input (that of 0.11 and 0.12 does not).
    """
    return registry.settings.protect == "all" and "gating" not in registry.problems


def fp32_view(config: Any) -> Any:
    """A shallow copy of `config` whose params_dtype is fp32. The shared config is never changed, not even briefly."""
    view = copy.copy(config)
    view.params_dtype = torch.float32
    return view


def reset_in_fp32(original: Callable[..., None]) -> Callable[..., None]:
    """Router.reset_parameters (0.13 and later): initialise in fp32 and leave it there."""

    @replaces(original)
    def reset_parameters(self: Any) -> None:
        if not (protects_parameters() and is_router(self)):
            original(self)
            return
        config = self.config
        self.config = fp32_view(config)
        try:
            original(self)
        finally:
            self.config = config

    return reset_parameters


def _guard(router: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`fn` without its demotions, for the tensors of `router` that are protected."""
    counters = {id(buffer) for name, buffer in router.named_buffers() if name.endswith(COUNTER)}
    buffers = {id(buffer) for buffer in router.buffers()}
    everything = protects_parameters()

    def apply_to(tensor: torch.Tensor) -> torch.Tensor:
        out = fn(tensor)
        if not tensor.is_floating_point() or out.dtype == tensor.dtype:
            return out
        if id(tensor) in counters and tensor.dtype == torch.float64:
            # fp32 would be exact to 2^24 only.
            return tensor.to(device=out.device)
        if below_fp32(out.dtype) and not below_fp32(tensor.dtype) and (everything or id(tensor) in buffers):
            return tensor.to(device=out.device, dtype=torch.float32)
        return out

    return apply_to


def mark_parameters(router: torch.nn.Module) -> None:
    """Mark the parameters of `router` that are kept in fp32, for optimizers, which do not see its module."""
    if protects_parameters():
        for parameter in router.parameters():
            if parameter.dtype == torch.float32:
                setattr(parameter, KEPT, True)


def widen_counter(router: torch.nn.Module) -> None:
    """Make the token counter of `router` float64, if it is still fp32."""
    counter = router._buffers.get(COUNTER)
    if counter is not None and counter.dtype == torch.float32:
        router._buffers[COUNTER] = counter.to(torch.float64)


def keep_fp32(original: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """TopKRouter._apply, which every cast, device move and to_empty() of a model goes through.

    Parameters keep their attributes (`sequence_parallel`, `allreduce`) also where torch installs new Parameter
    objects. Buffers that come off the meta device are zeroed: to_empty() leaves them uninitialised, and
    reset_parameters() knows nothing of them.
    """

    @replaces(original)
    def _apply(
        self: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.nn.Module:
        # Tensors (main_grad) are left out: they belong to the Parameter object that they were put on.
        flags = {
            name: {key: value for key, value in vars(parameter).items() if not isinstance(value, torch.Tensor)}
            for name, parameter in self._parameters.items()
            if parameter is not None
        }
        meta = [name for name, buffer in self._buffers.items() if buffer is not None and buffer.is_meta]
        result = original(self, _guard(self, fn), *args, **kwargs)
        for name, kept in flags.items():
            parameter = self._parameters[name]
            for key, value in kept.items():
                if key not in vars(parameter):
                    setattr(parameter, key, value)
        for name in meta:
            buffer = self._buffers[name]
            if buffer is not None and not buffer.is_meta:
                buffer.zero_()
        mark_parameters(self)
        widen_counter(self)
        return result

    return _apply


def remember(name: str, router: torch.nn.Module) -> None:
    """Note the name of `router` in its model, and which of its tensors are not below fp32 now."""
    tensors = [*router.named_parameters(), *router.named_buffers()]
    wrapped[router] = (name, {key: weakref.ref(tensor) for key, tensor in tensors if not below_fp32(tensor.dtype)})
