"""The effect: what the router tensors of a built model really are, and one line in the log that says so."""

from __future__ import annotations

import inspect
import itertools
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_fp32_router.casts.below import place, remember
from megatron_fp32_router.casts.router import below_fp32, mark_parameters, protects_parameters, widen_counter
from megatron_fp32_router.errors import ModelInUseError, UnprotectedRouterError
from megatron_fp32_router.gating import split
from megatron_fp32_router.gating.linear import in_words
from megatron_fp32_router.gating.logits import compute_dtype, mirrored
from megatron_fp32_router.log import say
from megatron_fp32_router.patching.megatron import of_module
from megatron_fp32_router.patching.registry import mismatch, registry, replaces, runs, settle, status
from megatron_fp32_router.settings import PREFIX
from megatron_fp32_router.version import __version__

_ROUTER_MODULE = "megatron.core.transformer.moe.router"


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
    for name, parameter in router.named_parameters():
        if parameter.is_floating_point():
            yield name, parameter, True
    for name, buffer in router.named_buffers():
        if buffer.is_floating_point():
            yield name, buffer, False


def routers_of(module: torch.nn.Module) -> tuple[list[tuple[str, Any]], tuple[str, ...]]:
    """The TopKRouters in `module`, and the names of routers of other kinds that are not protected."""
    upstream = sys.modules.get(_ROUTER_MODULE)
    if upstream is None:
        return [], ()
    found, foreign = [], []
    for name, child in module.named_modules():
        if isinstance(child, upstream.TopKRouter):
            found.append((name, child))
        elif isinstance(child, tuple(registry.router_classes)):
            continue
        elif isinstance(child, upstream.Router) or getattr(child, "expert_bias", None) is not None:
            foreign.append(f"{name} ({type(child).__module__}.{type(child).__qualname__})")
    return found, tuple(foreign)


def _protected(module: torch.nn.Module) -> list[tuple[str, Any]]:
    """The TopKRouters in `module`, and the routers of classes that protect_router_class was given."""
    classes = tuple(registry.router_classes)
    theirs = [(name, child) for name, child in module.named_modules() if isinstance(child, classes)]
    return routers_of(module)[0] + theirs


def survey(module: torch.nn.Module) -> Survey:
    """Look at every router tensor of `module` as it is now."""
    routers, foreign = _protected(module), routers_of(module)[1]
    dtypes: Counter[tuple[str, torch.dtype]] = Counter()
    below = []
    for router_name, router in routers:
        for name, tensor, is_parameter in tensors_of(router):
            dtypes[name, tensor.dtype] += 1
            if below_fp32(tensor.dtype) and (protects_parameters() or not is_parameter):
                below.append(f"{router_name}.{name} ({tensor.dtype}; {place(router, router_name)})")
    return Survey(len(routers), dict(dtypes), tuple(below), foreign)


def _products(routers: Iterable[Any], config: Any) -> str:
    """How these TopKRouters will multiply, as far as can be told before the first forward."""
    gating = next(record for record in status() if record.id == "gating")
    if not runs("gating"):
        return f"the products of others: {gating.detail or gating.state}"
    activations = torch.float16 if getattr(config, "fp16", False) else torch.bfloat16
    ways = set()
    for router in routers:
        if isinstance(router, tuple(registry.router_classes)):
            ways.add(f"the products of {type(router).__module__}.{type(router).__qualname__}")
            continue
        weight, owner = router.weight, dict(_own_functions(router)).get("gating")
        if owner:
            ways.add(f"the products of {owner}")
        elif weight.is_meta or (weight.device.type == "cpu" and torch.cuda.is_available()):
            ways.add(f"products chosen at the first forward (the weight is still on {weight.device.type})")
        else:
            ways.add(in_words(split.why_not(weight.device, activations, weight, compute_dtype(config, weight))))
    return "; ".join(sorted(ways))


def _own_functions(router: torch.nn.Module) -> Iterator[tuple[str, str]]:
    """(name, its full name) of what a subclass, or an attribute of this router, has in the place of a patched function.

    Not those that call super(): ours runs below them. What somebody put on Megatron's own class is status()'s matter.
    """
    users = itertools.takewhile(lambda cls: cls.__module__.partition(".")[0] != "megatron", type(router).__mro__)
    places = [vars(router), *map(vars, users)]
    for name in ("gating", "forward", "_apply"):
        function = next((place[name] for place in places if name in place), None)
        if function is None:
            continue
        code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
        if code is None or not {"super", name} <= set(code.co_names):
            module = getattr(function, "__module__", type(function).__module__)
            yield name, f"{module}.{getattr(function, '__qualname__', type(function).__name__)}"


def _say_whose_functions_run(routers: Iterable[Any]) -> None:
    """Once: routers of a class of the user's decide for themselves in what precision they compute."""
    own = sorted({found for router in routers for found in _own_functions(router)})
    if own:
        registry.notes.setdefault("gating", set()).update(f"not in {owner}" for name, owner in own if name == "gating")
        say(
            logging.WARNING,
            f"routers of this model have functions of their own: {', '.join(owner for _, owner in own)}. The plugin's "
            "run only where these call super(); what they compute in is theirs to decide, on fp32 weights.",
            threshold=registry.settings.log,
            once=True,
        )


def _report(module: torch.nn.Module, config: Any) -> None:
    """Say what is there; raise or warn when it is not what was promised."""
    found = survey(module)
    for name, router in _protected(module):
        remember(name, router)
    stage = getattr(config, "virtual_pipeline_model_parallel_size", None) and getattr(module, "vp_stage", None)
    chunk = f" (model chunk {stage})" if stage is not None else ""
    release = of_module(sys.modules["megatron.core"])
    if found.foreign:
        mismatch(
            UnprotectedRouterError,
            f"these routers are not built on Megatron's TopKRouter and are not protected{chunk}: "
            f"{', '.join(found.foreign[:3])}. Derive them from TopKRouter, call "
            "megatron_fp32_router.protect_router_class(cls) before the model is built (docs/limits.md), or set "
            f"{PREFIX}_ON_MISMATCH=warn.",
        )
    if found.below:
        listed = ", ".join(found.below[:3]) + (" …" if len(found.below) > 3 else "")
        mismatch(
            UnprotectedRouterError,
            f"{len(found.below)} router tensors are below fp32 after wrapping{chunk}: {listed}. The model was built "
            "before the plugin was active, load_state_dict(assign=True) has put a state's tensors there, Megatron's "
            "router module was reloaded, or another patch casts them. Import megatron_fp32_router before the model is "
            "built and load without assign, or call megatron_fp32_router.protect_model(model) before wrapping it; "
            f"{PREFIX}_ON_MISMATCH=warn trains on as it is.",
        )
    elif found.routers:
        routers = [router for _, router in _protected(module)]
        protected = "all" if protects_parameters() else "buffers"
        like = f", rounded like {registry.settings.like}" if registry.settings.like else ""
        say(
            logging.INFO,
            f"megatron-fp32-router {__version__} on {release}{chunk}: {found} (protect={protected}); "
            f"gating in {_products(routers, config)}{like}",
            threshold=registry.settings.log,
        )
        if (mirror := mirrored()) is not None:
            owners = {owner for router in routers for name, owner in _own_functions(router) if name != "_apply"}
            mirror.announce(routers, owners)
        _say_what_is_displaced()
        _say_whose_functions_run(router for _, router in routers_of(module)[0])


def _say_what_is_displaced() -> None:
    """Once, not on every chunk. Their functions get fp32 tensors and exact counters; what they do is theirs."""
    displaced = [f"{record.target} ({record.detail})" for record in status() if record.state == "displaced"]
    if displaced:
        say(
            logging.WARNING,
            "not in effect, because somebody else's function is in its place: " + "; ".join(displaced) + ". Router "
            "tensors are fp32 and token counters exact all the same.",
            threshold=registry.settings.log,
            once=True,
        )


def look_after_wrapping(original: Callable[..., None]) -> Callable[..., None]:
    """Float16Module.__init__: right after the cast, look at the tensors and say in one line what they are."""

    @replaces(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        settle()
        original(self, *args, **kwargs)
        _report(self.module, getattr(self.module, "config", None))
        registry.models.add(self.module)

    return __init__


def totals(models: Iterable[torch.nn.Module]) -> tuple[int, int]:
    """Over these models: how many protected routers there are, and how many of their tensors are fp32 or better."""
    routers = {id(router): router for module in models for _, router in _protected(module)}
    tensors = [tensor for router in routers.values() for _, tensor, _ in tensors_of(router)]
    return len(routers), sum(not below_fp32(tensor.dtype) for tensor in tensors)


def _chunks(model: Any) -> Iterable[torch.nn.Module]:
    chunks: Iterable[torch.nn.Module] = model if isinstance(model, (list, tuple)) else [model]
    return chunks


def protect_model(model: Any) -> Survey:
    """See megatron_fp32_router.protect_model."""
    total = Survey(0, {}, (), ())
    for chunk in _chunks(model):
        for _, router in _protected(chunk):
            if any(hasattr(parameter, "main_grad") for parameter in router.parameters()):
                raise ModelInUseError(
                    "protect_model() came after DDP: the parameters are views of its buffers now. "
                    "Call it on the bare or Float16Module-wrapped model, before DDP and the optimizer."
                )
        for _, router in _protected(chunk):
            _widen(router)
        found = survey(chunk)
        dtypes = Counter(total.dtypes)
        dtypes.update(found.dtypes)
        total = Survey(
            total.routers + found.routers,
            dict(dtypes),
            total.below + found.below,
            total.foreign + found.foreign,
        )
    say(
        logging.WARNING,
        f"protect_model: {total}. Bits that were lost before this call stay lost.",
        threshold=registry.settings.log,
    )
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
