"""Load of the experts of one layer in one global batch, from exact counts. Plain Python numbers, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence


def expert_load(counts_E: Sequence[int]) -> dict[str, float]:
    """What docs/monitor.md calls load/*.

    Args:
        counts_E: tokens per expert, summed over all ranks that share a balance update.

    Returns:
        Metric name -> number; empty where no token was routed.
    """
    experts, total = len(counts_E), sum(counts_E)
    if not total:
        return {}
    mean = total / experts
    deviations = [count / mean - 1 for count in counts_E]
    shares = [count / total for count in counts_E if count]
    entropy = -sum(share * math.log(share) for share in shares)
    return {
        "load/max_vio": max(deviations),
        "load/min_vio": min(deviations),
        "load/avg_vio": sum(map(abs, deviations)) / experts,
        "load/cv": math.sqrt(sum(deviation**2 for deviation in deviations) / experts),
        "load/diversity": math.exp(entropy) / experts,
        "load/dead_experts": float(sum(count == 0 for count in counts_E)),
        "load/experts": float(experts),
        "load/assignments": float(total),
    }
