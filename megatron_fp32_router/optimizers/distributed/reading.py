"""A distributed checkpoint saved with the plugin's other setting: what to read from it, and what to make of that."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

import torch

from megatron_fp32_router.casts.router import below_fp32
from megatron_fp32_router.optimizers.distributed import mapping

#: Where something is in nested dictionaries and lists: keys and indices.
Path: TypeAlias = tuple[Any, ...]

#: A router parameter of the model, not of an optimizer: "decoder.layers.mlp.router.weight".
_ROUTER_PARAMETER: Final = re.compile(r"(?!.*optimizer\.)(.*\.)?router\.(weight|bias)")
#: A main copy in an optimizer's state that is stored by parameter name.
_MAIN: Final = re.compile(r"optimizer\.state\.(?:fp32_)?param\.(.*)")


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(where, what) of everything in nested dictionaries and lists; a Request is taken whole."""
    if isinstance(value, dict | list | tuple) and not isinstance(value, mapping.Request):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, (*path, key))
    else:
        yield path, value


def at(tree: Any, path: Path) -> Any:
    """What is at `path`."""
    for key in path:
        tree = tree[key]
    return tree


def put(tree: Any, path: Path, value: Any) -> None:
    """Change what is at `path`."""
    at(tree, path[:-1])[path[-1]] = value


def _exchanged(tree: Any, path: Path, value: Any) -> Any:
    """A copy of `tree` with `value` at `path`. It shares everything else with `tree`, which is not changed."""
    if not path:
        return value
    copied = list(tree) if isinstance(tree, list | tuple) else dict(tree)
    copied[path[0]] = _exchanged(tree[path[0]], path[1:], value)
    return copied


@dataclass
class Plan:
    """How to load a sharded state dict.

    Attributes:
        changes: where in it -> what to ask for there.
        after: what to do with the state that was loaded.
        problem: why it cannot be loaded, or "".
    """

    changes: dict[Path, Any] = field(default_factory=dict)
    after: list[Callable[[Any], None]] = field(default_factory=list)
    problem: str = ""

    def asked(self, tree: Any) -> Any:
        """The sharded state dict with the changes."""
        for path, value in self.changes.items():
            tree = _exchanged(tree, path, value)
        return tree

    def finish(self, state: Any) -> None:
        """Make of the loaded state what was asked for at first."""
        for step in self.after:
            step(state)


def plan(tree: Any, metadata: Callable[[], dict[str, Any]], misfit: Callable[..., str]) -> Plan:
    """Look at a sharded state dict and at what the checkpoint has.

    Args:
        metadata: reads the checkpoint's (key -> dtype and shape of each tensor); called only where it is needed.
        misfit: says why buffers fit neither setting: those that were saved, those here, those with the other setting.
    """
    result = Plan()
    entries = list(_leaves(tree))
    sharded = [(path, entry) for path, entry in entries if hasattr(entry, "key")]
    tensors = [(path, entry) for path, entry in sharded if isinstance(entry.data, torch.Tensor)]
    routers = [(path, entry) for path, entry in tensors if _ROUTER_PARAMETER.fullmatch(entry.key)]
    mains = [(path, entry, match[1]) for path, entry in tensors if (match := _MAIN.fullmatch(entry.key))]
    requests = [(path, entry) for path, entry in entries if isinstance(entry, mapping.Request)]
    if not requests and not (mains and routers):
        return result
    saved = metadata()
    for path, request in requests:
        found = mapping.saved_cut(request.prefix, saved)
        here, flipped = mapping.cut(mapping.present(request.optimizer)), mapping.flipped(request.optimizer)
        if not flipped or not found or found == here:
            continue
        other = mapping.other(request.optimizer)
        if other is None or mapping.cut(other) != found:
            result.problem = misfit(found, here, other and mapping.cut(other))
            return result
        moved = mapping.asked_anew(request, other, saved)
        result.changes[path] = moved
        result.after.append(_with_own_counts(path, request.optimizer))
        for (where, parameter, part, before), (_, _, _, now) in zip(request.slices(), moved.slices(), strict=True):
            if before["param"].dtype != now["param"].dtype:
                home = next(path for path, router in routers if router.data is parameter)
                result.after.append(_main_of(now["param"].dtype, (*path, *where, "param"), home, part))
    for path, entry, name in mains:
        if not _ROUTER_PARAMETER.fullmatch(name):
            continue
        homes = [p for p, router in routers if (router.key, router.global_offset) == (name, entry.global_offset)]
        stored = saved[entry.key].dtype if entry.key in saved else entry.dtype
        if homes and stored.is_floating_point != entry.dtype.is_floating_point:
            result.changes[path] = replace(entry, data=torch.empty_like(entry.data, dtype=stored), dtype=stored)
            part = getattr(entry, "flattened_range", None) or slice(None)
            result.after.append(_main_of(stored, path, homes[0], part))
    # Of data, since factories of sharded tensors (a gated MLP's) have no dtype of their own.
    rests = [entry.data.dtype for _, entry, _ in mains]
    rests += [asked["param"].dtype for _, request in requests for _, _, _, asked in request.slices()]
    for path, router in routers:
        # With remainders an fp32 weight is not rounded to nearest even, but to what its remainder completes.
        was_fp32 = router.key in saved and saved[router.key].dtype == torch.float32
        if torch.int16 in rests and was_fp32 and below_fp32(router.dtype):
            exact = torch.empty_like(router.data, dtype=torch.float32)
            result.changes[path] = replace(router, data=exact, dtype=exact.dtype)
            result.after.append(_weight_of(path))
    return result


def _with_own_counts(path: Path, optimizer: Any) -> Callable[[Any], None]:
    """Put the sizes of this run's buckets in the place of the saved ones: Megatron compares them."""

    def step(state: Any) -> None:
        put(state, (*path, "per_bucket_numel_unpadded"), optimizer.per_bucket_numel_unpadded)

    return step


# Main copies of which a precision-aware optimizer stores the lower 16 bits alone (store_param_remainders) ------------


def _main_of(stored: torch.dtype, path: Path, home: Path, part: slice) -> Callable[[Any], None]:
    """Make fp32 of a main copy that was stored as int16, with the weight at `home`; of one in fp32 its remainder."""

    def step(state: Any) -> None:
        main = at(state, path)
        if stored == torch.int16:
            put(state, path, join(at(state, home).flatten()[part], main))
        else:
            put(state, path, split(main)[1])

    return step


def _weight_of(path: Path) -> Callable[[Any], None]:
    """Make of a main copy the bf16 weight that its remainder completes."""
    return lambda state: put(state, path, split(at(state, path))[0])


def join(weight: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """The fp32 main copy of a bf16 weight (its values, in any dtype) and the lower 16 bits, as int16.

    FusedAdam rounds by the sign of those bits: where they are negative, the weight is one above the upper 16 bits
    (transformer_engine/common/multi_tensor/adam.cu).
    """
    upper = weight.to(torch.bfloat16).view(torch.int16).int() - (rest < 0).int()
    return ((upper << 16) | (rest.int() & 0xFFFF)).view(torch.float32)


def split(main: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(bf16 weight, lower 16 bits as int16) of an fp32 main copy: what `join` puts together."""
    bits = main.view(torch.int32)
    rest = (((bits & 0xFFFF) ^ 0x8000) - 0x8000).to(torch.int16)
    return ((bits >> 16) + (rest < 0)).to(torch.int16).view(torch.bfloat16), rest
