"""The layer-wise distributed optimizer (0.16 and later) with fp32 parameters beside bf16 ones.

Every rank updates whole parameters of its own, and then all are gathered as one flat tensor in the first one's dtype:
two dtypes are an error. Here they are gathered once for each dtype. Where Megatron gathers bucket by bucket (with
overlap, or with a parameter layout), buckets are of one dtype already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

from megatron_fp32_router.patching.registry import replaces

#: Which rank owns which parameter: a list for each rank, the same on all of them, or None.
_LISTS: Final = ("dp_cp_params_list", "expt_dp_params_list")


@contextlib.contextmanager
def _only(optimizer: Any, dtype: torch.dtype) -> Iterator[None]:
    """Show Megatron parameters of `dtype` only.

    A rank that owns none of them gets an empty one: the first rank's first parameter is asked for the dtype.
    """
    kept = {name: getattr(optimizer, name) for name in _LISTS}
    try:
        for name, lists in kept.items():
            found = [[param for param in params if param.dtype == dtype] for params in lists or ()]
            some = next((params[0] for params in found if params), None)
            shown = None if some is None else [params or [some.detach().new_empty(0)] for params in found]
            setattr(optimizer, name, shown)
        yield
    finally:
        for name, lists in kept.items():
            setattr(optimizer, name, lists)


def gather_by_dtype(original: Callable[..., None]) -> Callable[..., None]:
    """LayerWiseDistributedOptimizer.allgather_params."""

    @replaces(original)
    def allgather_params(self: Any) -> None:
        owned = (param for name in _LISTS for params in getattr(self, name) or () for param in params)
        dtypes = list(dict.fromkeys(param.dtype for param in owned))
        if len(dtypes) < 2:
            original(self)
            return
        for dtype in dtypes:
            with _only(self, dtype):
                original(self)

    return allgather_params


def spread_loaded_weights(original: Callable[..., None]) -> Callable[..., None]:
    """LayerWiseDistributedOptimizer.load_state_dict and load_state_dict_from_file: gather fp32 parameters afterwards.

    The rank that owns one has loaded it from the optimizer's main copy, the other ranks from the model's entry, which a
    run without the plugin has rounded to bf16.
    """

    @replaces(original)
    def load(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        with _only(self, torch.float32):
            self.allgather_params()

    return load
