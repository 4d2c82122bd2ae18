"""A quick walk over a model, and quick look-ups in its modules: what runs in every step visits every one of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from megatron_fp32_router.casts.router import COUNTER


def modules_of(model: Iterable[Any]) -> Iterator[Any]:
    """Every module of every chunk once, in the order of torch's modules(), which takes several times as long."""
    for chunk in model:
        seen, waiting = set(), [chunk]
        while waiting:
            module = waiting.pop()
            if module is not None and module not in seen:
                seen.add(module)
                yield module
                if module._modules:
                    waiting.extend(reversed(module._modules.values()))


def held(module: Any, name: str) -> Any:
    """What `module` has under `name`, or None.

    torch's own look-up comes last: a miss, as in nearly every module of a model, costs it microseconds.
    """
    found = module._buffers.get(name)
    if found is None and (name in module.__dict__ or name in module._parameters or hasattr(type(module), name)):
        return getattr(module, name, None)
    return found


def counted(module: Any) -> bool:
    """Whether `module` has a bias to update. A router without one (dense layers' stand-ins) has None there."""
    return held(module, "expert_bias") is not None and held(module, COUNTER) is not None
