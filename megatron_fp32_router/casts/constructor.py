"""Router.__init__ of 0.11 and 0.12, which casts. Imported only where it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_fp32_router.casts.router import fp32_view, is_router, protects_parameters
from megatron_fp32_router.patching.registry import replaces


def initialise_in_fp32(original: Callable[..., None]) -> Callable[..., None]:
    """Router.__init__, where it casts the weight to params_dtype right after initialising it."""

    @replaces(original)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if not (protects_parameters() and is_router(self)):
            original(self, config, *args, **kwargs)
            return
        original(self, fp32_view(config), *args, **kwargs)
        self.config = config

    return __init__
