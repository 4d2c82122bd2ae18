"""Real trainings with the laboratory, off and on, and what each update of a bias should have been.

Shapes: S steps, L layers (one router each), E experts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from megatron_fp32_router.lab.recipe import Recipe

RELEASES: Final = ("0.11.0", "0.16.1", "0.19.2")
STARTS: Final = (0.0, 0.75)
SEEDS: Final = (1, 2, 3, 4, 5)
STEPS: Final = 48

#: Fields of lab.Recipe. Small layers and many tokens: what goes wrong grows with tokens per expert, here 512 on the
#: mean, not with the size of the model.
SETTINGS: Final[dict[str, Any]] = {
    "layers": 1,
    "hidden": 16,
    "heads": 2,
    "moe_ffn": 8,
    "experts": 64,
    "topk": 8,
    "seq_length": 32,
    "micro_batch": 64,
    "micro_batches": 2,
    # So small that biases catch up with the router's first weights within the steps that there are.
    "lr": 1e-4,
    "bias_rate": 1e-3,
}

#: A point of a curve is the mean of this many steps.
THINNED: Final = 4
#: Figures "at the end" are means of this many last steps.
LAST: Final = 10

#: An update of a bias below 1 is right when it is the rate to within two of fp32's spacings there.
_EXACT: Final = 2 * 2.0**-24


class Run(NamedTuple):
    """One training. `name` is also its result's file."""

    release: str
    plugin: bool
    start: float
    seed: int

    @property
    def name(self) -> str:
        """As in 0.11.0-off-0.75-seed3."""
        return f"{self.release}-{'on' if self.plugin else 'off'}-{self.start:g}-seed{self.seed}"


def runs(releases: Iterable[str] = RELEASES, seeds: Iterable[int] = SEEDS) -> list[Run]:
    """All of them, a seed after the other."""
    return [
        Run(release, plugin, start, seed)
        for release, plugin, seed, start in product(releases, (False, True), seeds, STARTS)
    ]


def compared_with_rule(bias_SLE: np.ndarray[Any, Any], counts_SLE: np.ndarray[Any, Any], rate: float) -> dict[str, Any]:
    """Compare what the biases did with the integer rule, sign(total - E * count).

    Args:
        bias_SLE: fp64 [steps + 1, L, E], before the first and after every update.
        counts_SLE: int64 [steps, L, E], true tokens per expert.
        rate: by how much an update is to move a bias.

    Returns:
        How many updates were `due`; of them `swallowed` (the bias stayed), `reversed`, `wrong_size`; `unasked` ones.
        `wrong_at`: by step, those that did not go where they were due (wrong sizes are not in it).
        `step`: how far right-way updates went on the mean, over the rate.
    """
    import numpy as np

    due = np.sign(counts_SLE.sum(axis=-1, keepdims=True) - counts_SLE.shape[-1] * counts_SLE)
    moved = np.diff(bias_SLE, axis=0)
    went = np.sign(moved).astype(np.int64)
    asked, right = due != 0, went == due
    sizes = np.abs(moved[asked & right])
    return {
        "due": int(asked.sum()),
        "swallowed": int((asked & (went == 0)).sum()),
        "reversed": int((asked & (went == -due)).sum()),
        "unasked": int((~asked & (went != 0)).sum()),
        "wrong_size": int((np.abs(sizes - rate) > _EXACT).sum()),
        "step": float(sizes.mean() / rate) if sizes.size else None,
        "wrong_at": (~right).sum(axis=(1, 2)).tolist(),
    }


def train(recipe: Recipe, arguments: Mapping[str, Any]) -> dict[str, str]:
    """What the worker process does: one training after the other, each result written when it is there.

    Args:
        recipe: of every run but for its seed and the bias it starts from.
        arguments: `runs` as lists, `steps`, and `folder`, where the results go.

    Returns:
        torch's version.
    """
    import torch

    # oneDNN compiles its bf16 kernels for every new number of tokens of an expert, which takes most of a step.
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    for values in arguments["runs"]:
        run = Run(*values)
        result = _one(recipe, run, arguments["steps"])
        write(Path(arguments["folder"]) / f"{run.name}.json", result)
        print(f"{run.name}: {result['seconds']:.0f} s", flush=True)
    return {"torch": str(torch.__version__)}


def _one(recipe: Recipe, run: Run, steps: int) -> dict[str, Any]:
    from dataclasses import replace

    import numpy as np

    from megatron_fp32_router import lab as laboratory
    from megatron_fp32_router.lab.demo_run import Observer

    recipe = replace(recipe, seed=run.seed, bias_start=run.start)
    laboratory.seed(run.seed)
    lab = laboratory.build(recipe)
    observer = Observer(lab)
    lab.on_counts.append(observer.look)
    batches = laboratory.text_batches(recipe, run.seed)
    started = time.process_time()
    with lab.record_routing(observer.routings.append):
        losses = [lab.step(batches) for _ in range(steps)]
    seconds = time.process_time() - started
    bias_SLE, counts_SLE, counters_SLE = observer.recorded()
    found = compared_with_rule(bias_SLE, counts_SLE, recipe.bias_rate)
    violation_S = (counts_SLE.max(axis=-1) / counts_SLE.mean(axis=-1) - 1).mean(axis=-1)
    return {
        "release": run.release,
        "plugin": run.plugin,
        "start": run.start,
        "seed": run.seed,
        "steps": steps,
        "settings": settings_name(),
        **{name: value for name, value in found.items() if name != "wrong_at"},
        "wrong_at": _thinned(found["wrong_at"]),
        "count_error": float(np.abs(counters_SLE - counts_SLE).max()),
        "max_vio": _thinned(violation_S.tolist()),
        "max_vio_end": _mean(violation_S.tolist()[-LAST:]),
        "loss": _thinned(losses),
        "loss_end": _mean(losses[-LAST:]),
        "seconds": round(seconds, 1),
    }


def settings_name() -> str:
    """Short digest of SETTINGS, by which results of other settings are told apart."""
    import hashlib

    return hashlib.sha256(json.dumps(SETTINGS, sort_keys=True).encode()).hexdigest()[:12]


def _mean(values: list[float]) -> float:
    return float(f"{sum(values) / len(values):.6g}")


def _thinned(values: list[float]) -> list[float]:
    return [float(f"{_mean(values[at : at + THINNED]):.4g}") for at in range(0, len(values), THINNED)]


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write one line for each entry; all or nothing, so that a training that was stopped is run again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in result.items())
    partial = path.with_suffix(".partial")
    partial.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    partial.replace(path)
