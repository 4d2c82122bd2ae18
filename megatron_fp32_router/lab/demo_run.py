"""What the demo's worker process does: train, watch every balance update, and judge it.

Whether an update was right is decided by NumPy int64 arithmetic on the routing maps that were recorded, not
by anything that Megatron or the plugin counted.
Shapes: S steps, L layers, E experts, T tokens, H hidden size.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import torch

    from megatron_fp32_router.lab.recipe import Recipe
    from megatron_fp32_router.lab.train import Lab, Routing

#: Load violation and loss are averaged over this many last steps: a single step's mostly depend on its text.
_LAST: Final = 10


def _dtypes(lab: Lab) -> dict[str, str]:
    """Router tensor -> dtype name; several, joined by "/", if routers differ."""
    import torch

    found: dict[str, set[str]] = {}
    for _, router in lab.routers():
        tensors = [*router.named_parameters(), *router.named_buffers()]
        for name, tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                found.setdefault(name, set()).add(str(tensor.dtype).removeprefix("torch."))
    return {name: "/".join(sorted(dtypes)) for name, dtypes in found.items()}


def _best_weight(lab: Lab, weight: torch.Tensor) -> tuple[torch.Tensor, str]:
    """The most precise copy of a router's weight that exists, [E, H] fp64, and what it is."""
    import torch

    if weight.dtype not in (torch.bfloat16, torch.float16):
        return weight.detach().double().clone(), "the fp32 weight"
    main = lab.main_weight(weight)
    what = "the optimizer's fp32 copy of the weight"
    if main.dtype == weight.dtype:
        what = "the model's bf16 weight (no fp32 copy is reachable)"
    return main.double().clone(), what


def _expert_sets(hidden_TH: torch.Tensor, router: Any, weight_EH: torch.Tensor, bias_E: torch.Tensor) -> torch.Tensor:
    """The experts that fp64 would choose: bool [T, E]. As in Megatron, the bias is added to sigmoid scores."""
    import torch

    logits_TE = hidden_TH.double() @ weight_EH.t()
    linear_bias = getattr(router, "bias", None)
    if linear_bias is not None:
        logits_TE = logits_TE + linear_bias.detach().double()
    chosen = (torch.sigmoid(logits_TE) + bias_E).topk(router.topk, dim=-1).indices
    return torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, chosen, True)


class Observer:
    """Watches a Lab step by step and keeps what the comparison needs. scripts/studies uses it too."""

    def __init__(self, lab: Lab, compare_at: int | None = None) -> None:
        """`compare_at`: the step, from 1, whose routing is compared with fp64."""
        self.lab, self.compare_at = lab, compare_at
        self.names = [name for name, _ in lab.routers()]
        self.routings: list[Routing] = []
        #: One entry a step, [L, E]: true counts int64; what the counter held and the biases, before the
        #: update, fp64.
        self.counts: list[np.ndarray[Any, Any]] = []
        self.counters: list[np.ndarray[Any, Any]] = []
        self.biases: list[np.ndarray[Any, Any]] = []
        self.differing = self.compared = 0
        self.reference = ""

    def _stacked(self, name: str) -> np.ndarray[Any, Any]:
        import numpy as np

        return np.stack([getattr(r, name).detach().double().cpu().numpy() for _, r in self.lab.routers()])

    def look(self, _: Lab) -> None:
        """Called after the backward passes, when the balancer is about to read the counter."""
        import numpy as np

        counts = {name: np.zeros(self.lab.recipe.experts, np.int64) for name in self.names}
        for routing in self.routings:
            counts[routing.name] += routing.routing_map.cpu().numpy().astype(np.int64).sum(axis=0)
        self.counts.append(np.stack([counts[name] for name in self.names]))
        self.counters.append(self._stacked("local_tokens_per_expert"))
        self.biases.append(self._stacked("expert_bias"))
        if len(self.counts) == self.compare_at:
            self._compare()  # now: the optimizer will change the weights that made these decisions
        self.routings.clear()

    def _compare(self) -> None:
        for routing in self.routings:
            weight_EH, self.reference = _best_weight(self.lab, routing.router.weight)
            hidden_TH = routing.hidden.reshape(-1, routing.hidden.shape[-1])
            bias_E = routing.router.expert_bias.detach().double()
            sets_TE = _expert_sets(hidden_TH, routing.router, weight_EH, bias_E)
            self.differing += int((sets_TE != routing.routing_map).any(dim=-1).sum())
            self.compared += sets_TE.shape[0]

    def recorded(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Biases before the first and after every update [S + 1, L, E]; true counts and counters, both [S, L, E]."""
        import numpy as np

        return np.stack([*self.biases, self._stacked("expert_bias")]), np.stack(self.counts), np.stack(self.counters)

    def result(self) -> dict[str, Any]:
        """The part of a RUN (see demo_report.py) that was watched."""
        import numpy as np

        recipe = self.lab.recipe
        bias_SLE, counts_SLE, counters_SLE = self.recorded()
        result = compared(bias_SLE, counts_SLE, recipe.bias_rate)
        errors_SLE = np.abs(counters_SLE - counts_SLE)
        violation_SL = counts_SLE.max(axis=-1) / counts_SLE.mean(axis=-1) - 1
        result["series"] |= {
            "layers": self.names,
            "max_vio": violation_SL.mean(axis=-1).tolist(),
            "count_error": errors_SLE.max(axis=(1, 2)).tolist(),
        }
        return {
            **result,
            "count_error": float(errors_SLE.max()),
            "max_vio": float(violation_SL[-_LAST:].mean()),
            "disagree": self.differing / max(1, self.compared),
            "tokens_compared": self.compared,
            "reference_weight": self.reference,
        }


def compared(bias_SLE: np.ndarray[Any, Any], counts_SLE: np.ndarray[Any, Any], rate: float) -> dict[str, Any]:
    """Compare what the biases did with what exact counting asks for, bit for bit.

    Args:
        bias_SLE: fp64 [steps + 1, L, E], before the first and after every update.
        counts_SLE: int64 [steps, L, E], true tokens per expert.
        rate: by how much an update moves a bias.

    Returns:
        `updates` (counts of entries), `step` and a part of `series`, as demo_report.py describes them.
    """
    import numpy as np

    due = np.sign(counts_SLE.sum(axis=-1, keepdims=True) - counts_SLE.shape[-1] * counts_SLE)
    moved = np.diff(bias_SLE, axis=0)
    went = np.sign(moved).astype(np.int64)
    # An update should be one fp32 addition of the fp32 rate. Rounded to bf16, the rate alone is 0.055 % smaller.
    wanted = bias_SLE[:-1].astype(np.float32) + due.astype(np.float32) * np.float32(rate)
    asked, right = due != 0, went == due
    off_size = asked & right & (bias_SLE[1:] != wanted)
    wrong = ~right | off_size
    exact = np.concatenate([bias_SLE[:1], bias_SLE[:1] + rate * np.cumsum(due, axis=0)])
    sizes = np.abs(moved[asked & right])
    return {
        "updates": {
            "expected": int(asked.sum()),
            "exact": int((asked & ~wrong).sum()),
            "wrong_size": int(off_size.sum()),
            "reversed": int((asked & (went == -due)).sum()),
            "stuck": int((asked & (went == 0)).sum()),
            "unasked": int((~asked & (went != 0)).sum()),
            "wrong": int(wrong.sum()),
        },
        "step": float(np.median(sizes)) if sizes.size else 0.0,
        "series": {
            "bias": bias_SLE.transpose(1, 2, 0).tolist(),
            "exact": exact.transpose(1, 2, 0).tolist(),
            "wrong": (wrong & ~off_size).sum(axis=0).tolist(),
        },
    }


def train(recipe: Recipe, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Train once for each seed, in this worker process, and return RUNs (see demo_report.py).

    Args:
        recipe: one rank.
        arguments: `steps`, at least 1, `seeds`, and `progress`, a file that gets one line a step.
    """
    return [_train(replace(recipe, seed=seed), arguments) for seed in arguments["seeds"]]


def _train(recipe: Recipe, arguments: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    from megatron_fp32_router import lab as laboratory

    steps = arguments["steps"]
    laboratory.seed(recipe.seed)
    lab = laboratory.build(recipe)
    wrapped = _dtypes(lab)
    observer = Observer(lab, compare_at=steps)
    lab.on_counts.append(observer.look)
    batches = laboratory.text_batches(recipe, recipe.seed)
    started = time.process_time()
    losses = []
    with lab.record_routing(observer.routings.append), open(arguments["progress"], "a", encoding="utf-8") as lines:
        for _ in range(steps):
            losses.append(float(lab.step(batches)))
            print(f"{losses[-1]:.4f}", file=lines, flush=True)
    trained = _dtypes(lab)
    result = observer.result()
    result["series"]["loss"] = losses
    return {
        "seed": recipe.seed,
        "dtypes": {name: [wrapped.get(name, "absent"), trained[name]] for name in trained},
        **result,
        "loss": sum(losses[-_LAST:]) / len(losses[-_LAST:]),
        "cpu_seconds": time.process_time() - started,
        "torch": str(torch.__version__),
    }
