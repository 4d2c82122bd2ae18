"""What a router is called in messages and in the monitor."""

from __future__ import annotations

import re
from typing import Any


def layer_of(router: Any, name: str) -> int | str | None:
    """Megatron's layer number; of multi-token prediction "mtp 1", or "mtp 1.2" where depths have several layers.

    `name`: of the router in its model, "" if it is not known. HybridModel numbers the layers of each depth from 1.
    """
    number: int | None = getattr(router, "layer_number", None)
    depth = re.search(r"(?:^|\.)mtp\.layers\.(\d+)\..*\blayers\.", name)
    if number is not None and depth is not None:
        return f"mtp {int(depth[1]) + 1}.{number}"
    in_mtp = getattr(router, "is_mtp_layer", False) or "mtp" in name.split(".")
    return f"mtp {number}" if in_mtp and number is not None else number
