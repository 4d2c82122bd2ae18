"""Ranks in words."""

from __future__ import annotations

from collections.abc import Sequence


def ranks_text(ranks: Sequence[int]) -> str:
    """For example "rank 3", or "ranks 0-2, 7"."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    listed = ", ".join(texts[:20]) + (f" and {len(texts) - 20} more spans" if len(texts) > 20 else "")
    return f"rank{'' if len(ranks) == 1 else 's'} {listed}"
