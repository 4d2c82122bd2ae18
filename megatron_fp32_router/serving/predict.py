"""How many balance updates a Megatron without the plugin gets wrong: simulated, with its own arithmetic.

What a release computes (`finalize_model_grads._update_router_expert_bias`, `moe_utils.get_updated_expert_bias`): every
micro-batch is added to a counter in the model's dtype. In this dtype the counters of all ranks are added up, and to it
the mean and the step, sign times rate, are rounded. The step is added to a bias in the model's dtype (0.11) or in fp32
(from 0.12).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import ml_dtypes
import numpy as np
from packaging.version import InvalidVersion, Version

from megatron_fp32_router.errors import Fp32RouterError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

DTYPES: Final[dict[str, Any]] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}

#: How many counts are drawn for one row of the answer: they take about half a second.
DRAWS: Final = 1_000_000


class PredictionError(Fp32RouterError):
    """The run that was described cannot be simulated."""


@dataclass(frozen=True)
class Run:
    """A training run, as far as its balance updates depend on it. `tokens`: of one step, over all `ranks`."""

    release: str = "0.19.2"
    experts: int = 256
    topk: int = 8
    tokens: int = 1 << 22
    #: Ranks whose counters are added up: TP x CP x DP.
    ranks: int = 64
    #: Of one rank and step.
    micro_batches: int = 1
    layers: int = 58
    rate: float = 1e-3
    precision: str = "bfloat16"
    #: Every expert_bias at the start.
    bias: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise PredictionError for a run that is none, or a Megatron that nothing is known of."""
        try:
            known = Version("0.11") <= Version(self.release) < Version("0.20")
        except InvalidVersion:
            known = False
        if not known:
            raise PredictionError(f"expected a release of megatron-core from 0.11 to 0.19, found {self.release}")
        for name in ("experts", "topk", "tokens", "ranks", "micro_batches", "layers"):
            if getattr(self, name) < 1:
                raise PredictionError(f"expected {name} of at least 1, found {getattr(self, name)}")
        if self.topk >= self.experts:
            raise PredictionError(f"expected topk below the {self.experts} experts, found {self.topk}")
        if self.tokens % (self.ranks * self.micro_batches):
            parts = f"{self.ranks} ranks x {self.micro_batches} micro-batches"
            raise PredictionError(f"expected tokens that {parts} divide, found {self.tokens}")

    @property
    def bias_dtype(self) -> str:
        """What the release keeps expert_bias in while it trains."""
        return self.precision if Version(self.release) < Version("0.12") else "float32"


@dataclass(frozen=True)
class Share:
    """Shares of the simulated updates, by what became of them. `spread`: the experts' loads' standard deviation."""

    spread: float
    updates: int
    wrong_way: float
    not_made: float
    needless: float
    #: Right direction, but more than 1 % away from the rate.
    wrong_size: float

    @property
    def wrong(self) -> float:
        """The share of all wrong updates."""
        return self.wrong_way + self.not_made + self.needless + self.wrong_size


def updated(run: Run, bias: NDArray[Any], counts: Iterable[Iterable[NDArray[Any]]]) -> NDArray[Any]:
    """One update as the release makes it, bit for bit.

    Args:
        run: `precision`, `release` and `rate` matter.
        bias: [..., experts] of `run.bias_dtype`.
        counts: for every rank, for every micro-batch: integers [..., experts].

    Returns:
        The new biases, in the dtype that the release keeps them in.
    """
    low = DTYPES[run.precision]
    total: Any = None
    with np.errstate(all="ignore"):
        for of_rank in counts:
            local = np.zeros(bias.shape, low)
            for count in of_rank:
                local = local + count.astype(np.float32).astype(low)
            # A ring adds rank after rank, and rounds every sum.
            total = local if total is None else total + local
        mean = total.astype(np.float32).sum(axis=-1, keepdims=True, dtype=np.float32).astype(low)
        mean = (mean.astype(np.float32) / np.float32(bias.shape[-1])).astype(low)
        # torch's sign of NaN, which is infinity minus infinity here, is 0.
        sign = np.nan_to_num(np.sign((mean - total).astype(np.float32)))
        step = (sign * np.float32(run.rate)).astype(low)
        new: NDArray[Any] = bias + step.astype(bias.dtype)
    return new


def simulate(run: Run, spread: float) -> Share:
    """Draw counts for experts whose loads differ by `spread`, and compare a release's updates with the exact rule's."""
    random = np.random.default_rng(run.seed)
    rows = max(1, DRAWS // (run.experts * run.ranks * run.micro_batches))
    loads = np.maximum(1 + spread * random.standard_normal((rows, run.experts)), 0.01)
    loads /= loads.sum(axis=1, keepdims=True)
    picks = run.tokens * run.topk // (run.ranks * run.micro_batches)
    exact = np.zeros((rows, run.experts), np.int64)

    def drawn() -> Iterable[Iterable[NDArray[Any]]]:
        nonlocal exact
        for _ in range(run.ranks):
            parts = [random.multinomial(picks, loads) for _ in range(run.micro_batches)]
            exact += np.sum(parts, axis=0)
            yield parts

    old = np.full((rows, run.experts), run.bias, DTYPES[run.bias_dtype])
    moved = updated(run, old, drawn()).astype(np.float64) - old.astype(np.float64)
    right = np.sign(exact.sum(axis=1, keepdims=True) - run.experts * exact)
    made = np.sign(moved)
    size = np.abs(np.abs(moved) - run.rate) > 0.01 * run.rate
    return Share(
        spread,
        right.size,
        float((right * made < 0).mean()),
        float(((right != 0) & (made == 0)).mean()),
        float(((right == 0) & (made != 0)).mean()),
        float(((right == made) & (right != 0) & size).mean()),
    )


def swallowed_from(rate: float, precision: str, bias_dtype: str) -> tuple[float, int]:
    """The bias from which on a step away from zero changes nothing, and how many steps lead there at the least."""
    step = np.float32(rate).astype(DTYPES[precision]).astype(DTYPES[bias_dtype])
    limit = next(bias for bias in (2.0**e for e in range(-60, 60)) if (b := step.dtype.type(bias)) + step == b)
    if bias_dtype == "float32":
        # Millions of steps: counted for each range with one spacing, in which all steps have the same size.
        lows = (limit / 2.0**e for e in range(1, 40))
        return limit, round(sum(low / float((step.dtype.type(low) + step) - step.dtype.type(low)) for low in lows))
    at, steps = step * 0, 0
    while at + step != at:
        at, steps = at + step, steps + 1
    return float(at), steps


def predict(run: Run, spreads: Iterable[float]) -> dict[str, Any]:
    """Everything that `megatron-fp32-router predict` says, as plain values."""
    shares = [simulate(run, spread) for spread in spreads]
    mean = run.tokens * run.topk / run.experts
    # ml_dtypes has no spacing of its own: that of fp32, with the mantissa bits that are missing.
    gap = float(np.spacing(np.float32(mean))) * 2.0 ** (16 if run.precision == "bfloat16" else 13)
    limit, steps = swallowed_from(run.rate, run.precision, run.bias_dtype)
    return {
        "run": asdict(run),
        "bias_dtype": run.bias_dtype,
        "updates_per_step": run.layers * run.experts,
        "mean_count": mean,
        "spacing_of_counts": gap,
        "overflows": run.precision == "float16" and run.tokens * run.topk > 65_504,
        "swallowed_from": limit,
        "swallowed_after_steps": steps,
        "shares": [asdict(share) | {"wrong": share.wrong} for share in shares],
    }
