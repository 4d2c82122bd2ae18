"""What the router tensors of a model are after it was wrapped, and the line in the log that says so."""

from __future__ import annotations

import functools
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch

from megatron_fp32_router.casts.router import below_fp32, protects_parameters, remember
from megatron_fp32_router.gating import choose
from megatron_fp32_router.gating.logits import compute_dtype, mirrored
from megatron_fp32_router.log import say
from megatron_fp32_router.patching.apply import settle
from megatron_fp32_router.patching.megatron import of_module
from megatron_fp32_router.patching.record import ROUTER
from megatron_fp32_router.patching.registry import registry, replaces, runs, status
from megatron_fp32_router.version import __version__

#: Patched methods that a subclass of TopKRouter, or an attribute of a router, may replace.
PATCHED: Final = ("gating", "forward", "_apply")


@dataclass(frozen=True)
class Survey:
    """What a look at a model's routers found.

    Attributes:
        routers: how many TopKRouters there are, and routers of a class that protect_router_class was given.
        dtypes: (tensor name, dtype) -> how many such tensors, over all routers.
        below: full names of floating-point tensors that ought to be fp32 and are below it.
        foreign: names of routers that are no TopKRouter, which the plugin does not reach.
    """

    routers: int
    dtypes: dict[tuple[str, torch.dtype], int]
    below: tuple[str, ...]
    foreign: tuple[str, ...]

    def __str__(self) -> str:
        tensors = ", ".join(
            f"{name} {str(dtype).removeprefix('torch.')} x{count}" for (name, dtype), count in self.dtypes.items()
        )
        return f"{self.routers} router{'s' if self.routers != 1 else ''}: {tensors}"


def tensors_of(router: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """(name, tensor, whether it is a parameter) of every floating-point tensor of `router`."""
    for tensors, is_parameter in ((router.named_parameters(), True), (router.named_buffers(), False)):
        for name, tensor in tensors:
            if tensor.is_floating_point():
                yield name, tensor, is_parameter


Named = list[tuple[str, Any]]


def routers_of(module: torch.nn.Module) -> tuple[Named, Named, tuple[str, ...]]:
    """The TopKRouters in `module`, routers of classes that protect_router_class was given, and the names of others."""
    upstream = sys.modules.get(ROUTER)
    found: Named = []
    theirs: Named = []
    foreign = []
    for name, child in module.named_modules():
        if upstream is not None and isinstance(child, upstream.TopKRouter):
            found.append((name, child))
        elif isinstance(child, tuple(registry.router_classes)):
            theirs.append((name, child))
        elif upstream is not None and (isinstance(child, upstream.Router) or _has_bias(child)):
            foreign.append(f"{name} ({type(child).__module__}.{type(child).__qualname__})")
    return found, theirs, tuple(foreign)


def _has_bias(module: torch.nn.Module) -> bool:
    return getattr(module, "expert_bias", None) is not None


def protected_in(module: torch.nn.Module) -> Named:
    """The routers in `module` that the plugin protects."""
    found, theirs, _ = routers_of(module)
    return found + theirs


def survey(module: torch.nn.Module) -> Survey:
    """Look at every router tensor of `module` as it is now."""
    found, theirs, foreign = routers_of(module)
    dtypes: Counter[tuple[str, torch.dtype]] = Counter()
    below = []
    for router_name, router in (*found, *theirs):
        for name, tensor, is_parameter in tensors_of(router):
            dtypes[name, tensor.dtype] += 1
            if below_fp32(tensor.dtype) and (protects_parameters() or not is_parameter):
                from megatron_fp32_router.casts.below import place

                below.append(f"{router_name}.{name} ({tensor.dtype}; {place(router, router_name)})")
    return Survey(len(found) + len(theirs), dict(dtypes), tuple(below), foreign)


def _report(module: torch.nn.Module, config: Any) -> None:
    """Log what is there; raise or warn where a tensor or a router is not protected."""
    found = survey(module)
    routers = protected_in(module)
    for name, router in routers:
        remember(name, router)
    stage = getattr(config, "virtual_pipeline_model_parallel_size", None) and getattr(module, "vp_stage", None)
    chunk = f" (model chunk {stage})" if stage is not None else ""
    if found.foreign or found.below:
        from megatron_fp32_router.wrapping import unprotected

        unprotected.refuse(chunk, found.foreign, found.below)
    if found.routers and not found.below:
        _say_what_is_there(str(found), chunk, [router for _, router in routers], config)


def _say_what_is_there(found: str, chunk: str, routers: list[Any], config: Any) -> None:
    owners: dict[int, dict[str, str]] = {}
    ours = functools.partial(_products, config)
    gating = set(map(ours, routers))
    displaced = [record for record in status() if record.state == "displaced"]
    if displaced or not runs("gating") or not all(map(_is_as_megatron_made_it, routers)):
        from megatron_fp32_router.wrapping import others

        owners = {id(router): dict(others.own_functions(router, PATCHED)) for router in routers}
        gating = others.products(routers, owners, ours)
    protected = "all" if protects_parameters() else "buffers"
    like = f", rounded like {registry.settings.like}" if registry.settings.like else ""
    say(
        logging.INFO,
        f"megatron-fp32-router {__version__} on {of_module(sys.modules['megatron.core'])}{chunk}: {found} "
        f"(protect={protected}); gating in {'; '.join(sorted(gating))}{like}",
        threshold=registry.settings.log,
    )
    if (mirror := mirrored()) is not None:
        mirror.announce(routers, {own for names in owners.values() for name, own in names.items() if name != "_apply"})
    if displaced or owners:
        others.say_what_is_displaced(displaced)
        others.say_whose_functions_run(routers, owners)


def _is_as_megatron_made_it(router: torch.nn.Module) -> bool:
    """Whether neither its class nor one of its attributes can replace a patched function."""
    return type(router).__module__.startswith("megatron.") and not vars(router).keys() & set(PATCHED)


def _products(config: Any, router: Any) -> str:
    """How the plugin's gating will multiply for a router, as far as can be told before its first forward."""
    device = router.weight.device
    if device.type == "meta" or (device.type == "cpu" and torch.cuda.is_available()):
        return f"products chosen at the first forward (the weight is still on {device.type})"
    activations = torch.float16 if getattr(config, "fp16", False) else torch.bfloat16
    return choose.in_words(choose.why_not(device, activations, router.weight, compute_dtype(config, router.weight)))


def look_after_wrapping(original: Callable[..., None]) -> Callable[..., None]:
    """Float16Module.__init__: right after the cast, look at the tensors and say in one line what they are."""

    @replaces(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        settle()
        original(self, *args, **kwargs)
        _report(self.module, getattr(self.module, "config", None))
        registry.models.add(self.module)

    return __init__
