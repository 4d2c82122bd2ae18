"""Emerging optimizers that no test has run are refused before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megatron_fp32_router.optimizers.refusing import refuse
from megatron_fp32_router.patching.registry import replaces


def _grouped(optimizer: Any) -> Iterator[Any]:
    for group in getattr(optimizer, "param_groups", None) or ():
        yield from group["params"]


def _is_emerging(optimizer: Any) -> bool:
    """Whether this is an optimizer built on the package emerging_optimizers, other than Megatron's Muon from 0.18 on.

    Up to 0.17 it needs an older version of the package, which no test has run.
    """
    own = type(optimizer)
    if (own.__module__, own.__name__) == ("megatron.core.optimizer.emerging_optimizers", "TensorParallelMuon"):
        return False
    return any(
        base.__module__.partition(".")[0] == "emerging_optimizers"
        or base.__module__.startswith(("megatron.core.optimizer.muon", "megatron.core.optimizer.emerging_optimizers"))
        for base in type(optimizer).__mro__
    )


def look_at_configuration(original: Callable[..., None]) -> Callable[..., None]:
    """MixedPrecisionOptimizer.__init__, which every optimizer with main copies goes through.

    Raises:
        CombinationRefusedError: emerging optimizers.
    """

    @replaces(original)
    def __init__(self: Any, optimizer: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if _is_emerging(optimizer):
            refuse(
                _grouped(optimizer),
                f"{type(optimizer).__name__} from emerging_optimizers",
                "no test has run it, and it computes a router's update in lower precision whatever its parameters are",
                "Train with --optimizer adam",
                untested=True,
            )
        original(self, optimizer, config, *args, **kwargs)

    return __init__
