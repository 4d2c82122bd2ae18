"""What every rank of a pipeline says about its routers, for tests/megatron/test_messages.py."""

from __future__ import annotations

from typing import Any

from megatron_fp32_router import lab
from megatron_fp32_router.casts.below import place


def say(recipe: Any, arguments: dict[str, Any]) -> list[str]:
    """Runs in every rank."""
    return [place(router) for _, router in lab.build(recipe).routers()]
