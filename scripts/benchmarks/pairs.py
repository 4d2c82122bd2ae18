"""Timing two things in turn, and comparing them on a machine that does other work as well."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

Report = Callable[[str], None]


def clock(action: Callable[[], object]) -> float:
    """Milliseconds that one call takes."""
    begun = time.perf_counter_ns()
    action()
    return (time.perf_counter_ns() - begun) / 1e6


def compare(
    off: Callable[[], float],
    on: Callable[[], float],
    pairs: int,
    *,
    warm_up: int = 2,
    shuffle: bool = True,
) -> dict[str, Any]:
    """Run both `pairs` times, in turn and in random order, so that a busy moment slows both down.

    Args:
        off: does the thing without the plugin once and returns its milliseconds.
        on: the same with the plugin.
        pairs: how many pairs count.
        warm_up: how many pairs come first and do not count.
        shuffle: False where `off` has to come first in each.

    Returns:
        Medians in milliseconds; the median of the ratios on/off of the pairs, and the quartiles around it.
    """
    order = random.Random(0)
    times: dict[str, list[float]] = {"off": [], "on": []}
    for pair in range(warm_up + pairs):
        for name in order.sample(["off", "on"], k=2) if shuffle else ("off", "on"):
            taken = off() if name == "off" else on()
            if pair >= warm_up:
                times[name].append(taken)
    ratios = sorted(on / off for off, on in zip(times["off"], times["on"], strict=True))
    return {
        "pairs": pairs,
        "off_ms": statistics.median(times["off"]),
        "on_ms": statistics.median(times["on"]),
        "ratio": statistics.median(ratios),
        "ratio_from": ratios[pairs // 4],
        "ratio_to": ratios[-1 - pairs // 4],
    }
