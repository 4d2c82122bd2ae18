"""torch's switches for products in less than fp32, turned off and put back. Imported only where one of them is on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def turned_off() -> Iterator[None]:
    """Inside, fp32 matrix products are computed in fp32. Then every switch is as it was before."""
    candidates: list[tuple[Any, Any]] = [
        (torch.backends.cuda.matmul, torch.backends),
        (getattr(torch.backends.mkldnn, "matmul", None), torch.backends.mkldnn),
    ]
    places = [(place, above) for place, above in candidates if hasattr(place, "fp32_precision")]
    # A switch without a value of its own reads as the one above it. It must go on following that one.
    saved = [
        "none" if place.fp32_precision == getattr(above, "fp32_precision", None) else place.fp32_precision
        for place, above in places
    ]
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:
        legacy = "highest"  # contradictory switches; the new ones are restored below as they were
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(legacy)
        for (place, _), value in zip(places, saved, strict=True):
            place.fp32_precision = value
