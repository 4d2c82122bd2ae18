"""Routing stability: which experts a sample of tokens would be sent to if part of the arithmetic were narrower.

Everything stays on the device. Results are 0-dimensional fp64 tensors, which the caller copies to the host together.
Shapes: T tokens of the sample, H hidden size, E experts, G groups of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from megatron_fp32_router.gating.matmul import mm
from megatron_fp32_router.monitor.precision import sharded
from megatron_fp32_router.patching.registry import registry
from megatron_fp32_router.settings import PREFIX

#: Megatron's score functions, of logits [T, E].
_SCORES: Final[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits_TE: torch.softmax(logits_TE, dim=-1),
    "sqrtsoftplus": lambda logits_TE: torch.nn.functional.softplus(logits_TE).sqrt(),
}


@dataclass
class Sample:
    """Tokens that a router was given in one forward.

    Attributes:
        hidden_TH: the router's input, in its own dtype.
        chosen_TE: bool, the experts that were chosen; None where that cannot be compared (input noise, dropped
            tokens).
    """

    hidden_TH: torch.Tensor
    chosen_TE: torch.Tensor | None


def obstacle(router: Any) -> str | None:
    """Why the choices of `router` cannot be computed again, or None."""
    if registry.settings.like:
        return f"{PREFIX}_LIKE is set, and what it compares is computed without an engine's roundings"
    config = router.config
    kinds = config.moe_router_load_balancing_type
    if "sinkhorn" in ([kinds] if isinstance(kinds, str) else kinds):
        return "sinkhorn does not choose by scores alone"
    if router.score_function not in _SCORES:
        return f"the score function {router.score_function!r} is not known to the monitor"
    for option in ("moe_router_force_load_balancing", "moe_enable_routing_replay", "moe_router_force_biased"):
        if getattr(config, option, None) not in (None, False):
            return f"{option} is on"
    if sharded(router.weight):
        return "the weight is sharded over ranks"
    return "every token goes to every expert" if router.topk >= router.weight.shape[0] else None


def comparable(router: Any) -> bool:
    """Whether the router's own map holds exactly what its scores chose."""
    changing = ("moe_input_jitter_eps", "moe_expert_capacity_factor")
    return all(getattr(router.config, option, None) is None for option in changing)


def tf32(tensor: torch.Tensor) -> torch.Tensor:
    """fp32 `tensor` rounded to TF32's 10 bits of mantissa, to nearest and ties to even."""
    bits = tensor.float().contiguous().view(torch.int32)
    kept = bits + 0xFFF + ((bits >> 13) & 1)
    return (kept & ~0x1FFF).view(torch.float32)


class Rule:
    """How a router turns logits into a choice, as its configuration says."""

    def __init__(self, router: Any, bias_E: torch.Tensor | None) -> None:
        """`bias_E`: the expert bias that the sampled forward chose with, before this step's update."""
        config = router.config
        self.topk: int = router.topk
        self.groups: int | None = config.moe_router_num_groups
        self.group_topk: int | None = config.moe_router_group_topk
        self.function: str = router.score_function
        quantile = getattr(router, "qb_beta", None)
        # Quantile balancing chooses by logits minus qb_beta, whatever the score function.
        self.by_logits = quantile is not None or (self.function == "softmax" and not config.moe_router_pre_softmax)
        self.bias_E = -quantile.float() if quantile is not None else None if bias_E is None else bias_E.float()
        self.weight_EH = router.weight.detach().float()
        linear_bias = getattr(router, "bias", None)
        self.linear_bias_E = None if linear_bias is None else linear_bias.detach().float()

    def logits(self, hidden_TH: torch.Tensor, weight_EH: torch.Tensor | None = None) -> torch.Tensor:
        """[T, E] in true fp32 (fp64 for fp64 input)."""
        weight_EH = self.weight_EH if weight_EH is None else weight_EH
        dtype = torch.promote_types(torch.float32, hidden_TH.dtype)
        bias = None if self.linear_bias_E is None else self.linear_bias_E.to(dtype)
        return mm(hidden_TH.to(dtype), weight_EH.to(dtype).t(), bias)

    def scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """[T, E], what is compared between experts, before the bias."""
        return logits_TE if self.by_logits else _SCORES[self.function](logits_TE)

    def biased(self, scores_TE: torch.Tensor, bias_E: torch.Tensor | None = None) -> torch.Tensor:
        """[T, E], the scores that choose."""
        bias_E = self.bias_E if bias_E is None else bias_E
        return scores_TE if bias_E is None else scores_TE + bias_E.to(scores_TE.dtype)

    def selection(self, hidden_TH: torch.Tensor, weight_EH: torch.Tensor | None = None) -> torch.Tensor:
        """[T, E], the scores that choose, from the tokens themselves."""
        return self.biased(self.scores(self.logits(hidden_TH, weight_EH)))

    def eligible(self, selection_TE: torch.Tensor) -> torch.Tensor:
        """`selection_TE` with -inf in the groups that a token may not use."""
        if not (self.groups and self.group_topk):
            return selection_TE
        grouped_TGE = selection_TE.view(selection_TE.shape[0], self.groups, -1)
        each = max(1, self.topk // self.group_topk)
        best_TG = grouped_TGE.topk(each, dim=-1).values.sum(dim=-1)
        allowed_TG = largest(best_TG, self.group_topk)
        return grouped_TGE.masked_fill(~allowed_TG.unsqueeze(-1), float("-inf")).view_as(selection_TE)

    def chosen(self, selection_TE: torch.Tensor) -> torch.Tensor:
        """bool [T, E]: the top k. Of equal scores the lower expert wins, so that a result can be computed again."""
        return largest(self.eligible(selection_TE), self.topk)

    def margin(self, selection_TE: torch.Tensor) -> torch.Tensor:
        """[T]: how far the last expert that was chosen is ahead of the first that was not."""
        best = self.eligible(selection_TE).topk(self.topk + 1, dim=-1).values
        return best[:, -2] - best[:, -1]


def largest(values: torch.Tensor, number: int) -> torch.Tensor:
    """bool, like `values`: True for the `number` largest of each row; of equal values the first ones."""
    order = torch.sort(values, dim=-1, descending=True, stable=True).indices[:, :number]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, order, True)


def stability(rule: Rule, sample: Sample) -> dict[str, torch.Tensor]:
    """What docs/monitor.md calls flips/*, at_risk/* and margin/*: 0-dimensional fp64 tensors."""
    hidden_TH = sample.hidden_TH
    logits_TE = rule.logits(hidden_TH)
    scores_TE = rule.scores(logits_TE)
    selection_TE = rule.biased(scores_TE)
    reference_TE = rule.chosen(selection_TE)
    margin_T = rule.margin(selection_TE).double()
    narrower = {
        "bf16_weight": rule.selection(hidden_TH, _bf16(rule.weight_EH)),
        "bf16_logits": rule.biased(rule.scores(_bf16(logits_TE))),
        "bf16_scores": rule.biased(_bf16(scores_TE)),
        "tf32": rule.selection(tf32(hidden_TH), tf32(rule.weight_EH)),
    }
    if rule.bias_E is not None:
        narrower["bf16_bias"] = rule.biased(scores_TE, _bf16(rule.bias_E))
    found = {f"flips/{name}": _flips(rule.chosen(other_TE), reference_TE) for name, other_TE in narrower.items()}
    for name, other_TE in {**narrower, "fp32": rule.selection(hidden_TH.double())}.items():
        # A token whose margin is at least twice the largest error of its scores cannot change its experts.
        error_T = (other_TE.double() - selection_TE.double()).abs().amax(dim=-1)
        found[f"at_risk/{name}"] = (margin_T < 2 * error_T).double().mean()
    if sample.chosen_TE is not None:
        # Scores that are equal up to fp32's own error (error_T, after the loop) say nothing about the arithmetic. A
        # layer that has diverged saturates its scores, and has many of them.
        differs_T = (sample.chosen_TE != reference_TE).any(dim=-1)
        found["flips/actual"] = (differs_T & (margin_T > 2 * error_T)).double().mean()
    points = torch.quantile(margin_T, torch.tensor([0.01, 0.1, 0.5], dtype=torch.float64, device=margin_T.device))
    found |= {f"margin/{name}": point for name, point in zip(("p01", "p10", "p50"), points.unbind(), strict=True)}
    found["sample/tokens"] = torch.tensor(float(hidden_TH.shape[0]), dtype=torch.float64, device=hidden_TH.device)
    return found


def changed(rule: Rule, probe: Sample) -> dict[str, torch.Tensor]:
    """What docs/monitor.md calls probe/*. Puts this look's choice into `probe`, for the next look."""
    last_TE, now_TE = probe.chosen_TE, rule.chosen(rule.selection(probe.hidden_TH.to(rule.weight_EH.device)))
    assert last_TE is not None
    probe.chosen_TE = now_TE
    slots = (last_TE & ~now_TE).double().sum() / (now_TE.shape[0] * rule.topk)
    return {"probe/changed": _flips(now_TE, last_TE), "probe/slots_changed": slots}


def new_probe(rule: Rule, hidden_TH: torch.Tensor) -> Sample:
    """Tokens that are kept on the CPU as long as this process runs, and the experts that `rule` chooses for them."""
    return Sample(hidden_TH.cpu(), rule.chosen(rule.selection(hidden_TH)))


def _bf16(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.bfloat16().float()


def _flips(one_TE: torch.Tensor, other_TE: torch.Tensor) -> torch.Tensor:
    return (one_TE != other_TE).any(dim=-1).double().mean()
