"""torch FSDP2 (TorchFullyShardedDataParallel) with fp32 router parameters.

FSDP2 gathers and reduces the parameters of a unit together, and stops in the first forward where they have two dtypes.
Here each router that trains fp32 parameters is a unit of its own inside its layer's: gathered in fp32, its gradients
reduced in fp32, its parameters the optimizer's own.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

from megatron_fp32_router.casts.router import below_fp32, is_protected
from megatron_fp32_router.optimizers.fsdp.refusal import refuse_in
from megatron_fp32_router.patching.registry import replaces

_HOME: Final = "megatron.core.distributed.torch_fully_sharded_data_parallel"


def shard_routers_apart(original: Callable[..., None]) -> Callable[..., None]:
    """TorchFullyShardedDataParallel.__init__.

    Raises:
        CombinationRefusedError: this torch keeps FSDP2 private (before 2.6).
    """

    @replaces(original)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        from torch.distributed import fsdp

        if not hasattr(fsdp, "FSDPModule"):
            refuse_in(
                (*args, *kwargs.values()),
                "torch FSDP2 (--use-torch-fsdp2)",
                f"routers are sharded apart by what torch.distributed.fsdp has from 2.6 on, and this is torch "
                f"{torch.__version__}",
                "Train with torch 2.6 or later, or without --use-torch-fsdp2",
            )
            original(self, config, *args, **kwargs)
            return
        with _routers_first():
            original(self, config, *args, **kwargs)

    return __init__


@contextlib.contextmanager
def _routers_first() -> Iterator[None]:
    """Inside, the routers of every module that Megatron shards are sharded before it, with the same arguments."""
    home = sys.modules[_HOME]
    real = home.fully_shard

    @functools.wraps(real)
    def fully_shard(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Where everything is fp32, one unit takes it all.
        two_dtypes = any(below_fp32(parameter.dtype) for parameter in module.parameters())
        for router in [inner for inner in module.modules() if two_dtypes and _trains_fp32(inner)]:
            _shard(router, real, args, kwargs)
        return real(module, *args, **kwargs)

    home.fully_shard = fully_shard  # type: ignore[attr-defined]
    try:
        yield
    finally:
        home.fully_shard = real  # type: ignore[attr-defined]


def _trains_fp32(module: torch.nn.Module) -> bool:
    """Whether `module` itself has fp32 router parameters to train. What has been sharded has new, unmarked ones."""
    return any(is_protected(one) and one.requires_grad for one in module.parameters(recurse=False))


def _shard(router: torch.nn.Module, fully_shard: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """`fully_shard(router)`, for a class whose first base is ABC too, as that of Megatron's Router is.

    The last thing that torch does is to give the module a class with FSDPModule as its first base, which Python does
    not allow there ("object layout differs"). It then gets one that has the same method resolution order.
    """
    from torch.distributed.tensor import DTensor

    try:
        fully_shard(router, *args, **kwargs)
    except TypeError:
        if not all(isinstance(parameter, DTensor) for parameter in router.parameters(recurse=False)):
            raise
        kind: Any = type(router)
        router.__class__ = _sharded_class(kind)


@functools.cache
def _sharded_class(kind: Any) -> Any:
    """A class of `kind`'s layout in which FSDPModule comes before `kind`, as in the classes that torch makes."""
    from torch.distributed.fsdp import FSDPModule

    meta: Any = type(kind)

    class FsdpFirst(meta):  # type: ignore[misc]
        def mro(cls) -> list[type]:
            own, *others = super().mro()
            return [own, FSDPModule, *(one for one in others if one is not FSDPModule)]

    return FsdpFirst(f"FSDP{kind.__name__}", (kind, FSDPModule), {})


def lend_gradients(original: Callable[..., None]) -> Callable[..., None]:
    """Float16OptimizerWithFloat16Params._copy_model_grads_to_main_grads.

    It takes the gradient of an fp32 parameter from `main_grad`, which FSDP2's parameters do not have: theirs is in
    `grad`, where the optimizer wants it.
    """

    @replaces(original)
    def _copy_model_grads_to_main_grads(self: Any) -> None:
        groups = getattr(self, "fp32_from_fp32_groups", ())
        without = [parameter for group in groups for parameter in group if not hasattr(parameter, "main_grad")]
        for parameter in without:
            parameter.main_grad = parameter.grad
        try:
            original(self)
        finally:
            for parameter in without:
                del parameter.main_grad

    return _copy_model_grads_to_main_grads
