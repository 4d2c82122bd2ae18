"""Counts that many ranks add up in bf16, in a ring and in a tree, and whether the update's sign survives.

Nothing is trained: every rank's token counts are drawn (Poisson) for experts whose shares differ by a given spread.
They are added and compared as upstream does it: each rank's count is a bf16 number, each addition of the reduction is
rounded to bf16, and so is the mean over experts that the counts are compared with.
Shapes: T trials, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

#: experts -> (experts per token, tokens of a rank in a step). Per expert and rank 1,024, 768 and 512 tokens: with
#: 256 experts on 4,096 ranks that is about DeepSeek-V3's global batch.
SHAPES: Final = {8: (2, 4096), 64: (6, 8192), 256: (8, 16384)}
RANKS: Final[tuple[int, ...]] = (1, 8, 64, 512, 4096)
#: Standard deviation of an expert's share of the tokens, over the fair share.
SPREADS: Final = (0.2, 0.05, 0.01)
#: Counts that are drawn for each row, at most; and trials, at most.
DRAWN: Final = 20_000_000
TRIALS: Final = 1000
SEED: Final = 20261129


def cell_name(experts: int, spread: float) -> str:
    """Also its result's file."""
    return f"experts{experts}-spread{spread:g}"


def simulate(
    experts: int, spread: float, *, drawn: int = DRAWN, ranks: tuple[int, ...] = RANKS, report: Callable[[str], object]
) -> dict[str, Any]:
    """Every number of ranks, for one number of experts and one spread of their loads."""
    topk, tokens = SHAPES[experts]
    rows = []
    for count in ranks:
        report(f"{experts} experts, spread {spread:g}, {count} ranks")
        trials = max(2, min(TRIALS, drawn // (count * experts)))
        rows.append({"ranks": count, "trials": trials, **_row(experts, spread, count, trials, tokens * topk / experts)})
    return {"experts": experts, "topk": topk, "tokens": tokens, "spread": spread, "seed": SEED, "rows": rows}


def _row(experts: int, spread: float, ranks: int, trials: int, mean: float) -> dict[str, Any]:
    import numpy as np
    import torch

    random = np.random.default_rng([SEED, experts, round(spread * 1000), ranks])
    load_TE = mean * (1 + spread * random.standard_normal((trials, experts))).clip(min=0.0)
    exact_TE = np.zeros((trials, experts), np.int64)
    ring_TE = torch.zeros(trials, experts, dtype=torch.bfloat16)
    tree = Tree()
    for _ in range(ranks):
        local = random.poisson(load_TE)
        exact_TE += local
        local_TE = torch.from_numpy(local).bfloat16()
        ring_TE += local_TE
        tree.add(local_TE)
    due_TE = np.sign(exact_TE.sum(axis=-1, keepdims=True) - experts * exact_TE)
    off_TE = np.abs(exact_TE / exact_TE.mean(axis=-1, keepdims=True) - 1)
    sums = {"once": torch.from_numpy(exact_TE).bfloat16(), "tree": tree.total(), "ring": ring_TE}
    return {
        "max_vio": _four((exact_TE.max(axis=-1) / exact_TE.mean(axis=-1) - 1).mean()),
        # Of all updates of a trial, and of those of experts that are more than 1 % off: mean, and 95 % for the mean.
        **{
            f"{how}{suffix}": _share(upstream_sign(sum_TE).numpy() != due_TE, where)
            for how, sum_TE in sums.items()
            for suffix, where in (("", None), ("_beyond", off_TE > 0.01))
        },
    }


class Tree:
    """The sum of what is added, in pairs, pairs of pairs and so on, each addition in the dtype of what is added."""

    def __init__(self) -> None:
        self._partial: list[tuple[int, torch.Tensor]] = []

    def add(self, values: torch.Tensor) -> None:
        """Add the next rank's."""
        height = 0
        while self._partial and self._partial[-1][0] == height:
            values = self._partial.pop()[1] + values
            height += 1
        self._partial.append((height, values))

    def total(self) -> torch.Tensor:
        """The sum. Where the number of ranks is no power of two, several partial sums remain, added from the right."""
        total = self._partial[-1][1]
        for _, values in reversed(self._partial[:-1]):
            total = values + total
        return total


def upstream_sign(counts_TE: torch.Tensor) -> torch.Tensor:
    """As get_updated_expert_bias: everything in the dtype of the counts."""
    average = counts_TE.sum(dim=-1, keepdim=True) / counts_TE.shape[-1]
    return (average - counts_TE).sign().long()


def _share(wrong_TE: Any, where_TE: Any) -> list[float] | None:
    """[mean over trials, half the width of its 95 % interval]; None where there is nothing to share."""
    import numpy as np

    if where_TE is None:
        shares = wrong_TE.mean(axis=-1)
    else:
        found = where_TE.sum(axis=-1)
        shares = (wrong_TE & where_TE).sum(axis=-1)[found > 0] / found[found > 0]
    if len(shares) < 2:
        return None
    # Student's t for 95 %, to within 1 % of its value from 19 trials on.
    t = 1.96 + 2.5 / (len(shares) - 1)
    return [_four(shares.mean()), _four(t * np.std(shares, ddof=1) / len(shares) ** 0.5)]


def _four(value: float) -> float:
    return float(f"{value:.4g}")
