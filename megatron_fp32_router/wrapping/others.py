"""Other people's functions that run in place of ours. Imported only when there may be some."""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from megatron_fp32_router.log import say
from megatron_fp32_router.patching.registry import PatchStatus, registry, runs, status


def own_functions(router: torch.nn.Module, patched: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(name, full name) of each function that a subclass, or an attribute of this router, has instead of a patched one.

    Not those that call super(): ours runs below them. What somebody put on Megatron's own class is in status().

    Args:
        patched: names of the patched methods.
    """
    users = itertools.takewhile(lambda cls: cls.__module__.partition(".")[0] != "megatron", type(router).__mro__)
    places = [vars(router), *map(vars, users)]
    for name in patched:
        function = next((place[name] for place in places if name in place), None)
        if function is None:
            continue
        code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
        if code is None or not {"super", name} <= set(code.co_names):
            module = getattr(function, "__module__", type(function).__module__)
            yield name, f"{module}.{getattr(function, '__qualname__', type(function).__name__)}"


def products(
    routers: Iterable[torch.nn.Module], owners: Mapping[int, Mapping[str, str]], ours: Callable[[torch.nn.Module], str]
) -> set[str]:
    """Whose products the routers use. `owners`: as below. `ours`: says which of the plugin's a router uses."""
    if not runs("gating"):
        gating = next(record for record in status() if record.id == "gating")
        return {f"the products of others: {gating.detail or gating.state}"}
    found = set()
    for router in routers:
        kind, owner = type(router), owners[id(router)].get("gating")
        if isinstance(router, tuple(registry.router_classes)):
            owner = f"{kind.__module__}.{kind.__qualname__}"
        found.add(f"the products of {owner}" if owner else ours(router))
    return found


def say_whose_functions_run(routers: Iterable[torch.nn.Module], owners: Mapping[int, Mapping[str, str]]) -> None:
    """Warn once that routers of the user's own class decide themselves in what precision they compute.

    `owners`: id of a router -> its own_functions().
    """
    told = tuple(registry.router_classes)  # these are not asked: protect_router_class() says what it leaves to them
    own = sorted({found for router in routers if not isinstance(router, told) for found in owners[id(router)].items()})
    if own:
        registry.notes.setdefault("gating", set()).update(f"not in {owner}" for name, owner in own if name == "gating")
        say(
            logging.WARNING,
            f"routers of this model have functions of their own: {', '.join(owner for _, owner in own)}. The plugin's "
            "run only where these call super(). These get fp32 weights; in which dtype they compute is up to them.",
            once=True,
        )


def say_what_is_displaced(displaced: Iterable[PatchStatus]) -> None:
    """Warn once, and not for every model chunk, of patches that somebody else's functions have replaced.

    Those functions get fp32 tensors and exact counters; what they compute with them is up to them.
    """
    places = [f"{record.target} ({record.detail})" for record in displaced]
    if places:
        say(
            logging.WARNING,
            "not in effect, because somebody else's function is in its place: " + "; ".join(places) + ". Router "
            "tensors are still fp32, and token counters exact.",
            once=True,
        )
