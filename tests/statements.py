"""What ranks say of themselves, made up."""

from __future__ import annotations

from typing import Any


def statements(world: int, ranks_per_host: int = 8, **says: str) -> dict[int, dict[str, Any]]:
    return {
        rank: {
            "says": {"the plugin's version": "1.0", **says},
            "host": f"node{rank // ranks_per_host}",
            "local world size": str(ranks_per_host),
            "at optimizer": True,
            "routers": 2,
            "tensors": 6,
        }
        for rank in range(world)
    }
