"""The patch records: what is patched, what goes wrong without it, and since when and until when it is needed.

One record a target. Nothing here imports torch or Megatron: `factory` names the function in protect/ or optim/
that makes the replacement, and it is loaded when the Megatron module that it patches has been imported.
"""

from __future__ import annotations

from typing import Final

from megatron_fp32_router.records.monitor import MONITOR
from megatron_fp32_router.records.optimizers import OPTIMIZERS
from megatron_fp32_router.records.patch import AREAS, USUAL, Needless, Patch
from megatron_fp32_router.records.ranks import RANKS
from megatron_fp32_router.records.routers import ROUTERS

__all__ = ["AREAS", "PATCHES", "USUAL", "Needless", "Patch"]

#: In the order in which they are put in place: of two with one target, the later one is the outer one.
PATCHES: Final = (*ROUTERS, *RANKS, *OPTIMIZERS, *MONITOR)
