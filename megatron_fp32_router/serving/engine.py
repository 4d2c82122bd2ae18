"""Choose experts with the arithmetic of an engine, on the device that the tensors are on.

What is known of an engine is in contracts.py. Its kernels are compiled, so the rest is assumed: products accumulate in
fp32, and scores are computed in fp32 from the logits. Imports torch.
Shapes: T tokens, H hidden size, E experts, G groups of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megatron_fp32_router.gating.matmul import true_fp32
from megatron_fp32_router.monitor.stability import largest
from megatron_fp32_router.serving.contracts import NoContractError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from megatron_fp32_router.serving.contracts import Engine

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Arithmetic:
    """How logits are made and experts are chosen. The defaults round nothing.

    Attributes:
        topk: experts of each token.
        function: "sigmoid"; "softmax" over all experts; "logits": they are compared, and softmax is over the chosen.
        groups, group_topk: of group-limited routing. A group's score is the sum of its best two experts' where there is
            an expert bias, else its best expert's.
        hidden: dtype of the router's input.
        weight, bias, expert_bias: dtypes in which the engine keeps these; None: it uses none.
        logits: their dtype.
        ties: which of several experts with equal scores is chosen: the "lower" one, or the one that "torch.topk" takes.
    """

    topk: int
    function: str
    groups: int | None = None
    group_topk: int | None = None
    hidden: torch.dtype = torch.float32
    weight: torch.dtype = torch.float32
    bias: torch.dtype | None = torch.float32
    expert_bias: torch.dtype | None = torch.float32
    logits: torch.dtype = torch.float32
    ties: str = "lower"


@dataclass(frozen=True)
class Routed:
    """logits [T, E] in the engine's dtype; scores [T, E] float32, before the bias; chosen [T, E] bool."""

    logits_TE: torch.Tensor
    scores_TE: torch.Tensor
    chosen_TE: torch.Tensor


def arithmetic_of(
    engine: Engine, config: Mapping[str, Any], topk: int, groups: int | None = None, group_topk: int | None = None
) -> Arithmetic:
    """What an engine's contract says of the model that a config.json describes.

    Raises:
        NoContractError: nothing is known of its architecture, or not the dtype of one of these tensors.
    """
    model = engine.model(config["architectures"][0])
    found: dict[str, torch.dtype | None] = {}
    for kind in ("weight", "bias", "expert_bias", "logits"):
        entry = model.usual(kind, config)
        if entry is None and kind in ("bias", "expert_bias"):
            found[kind] = None
            continue
        dtype = None if entry is None else model.resolved(entry, config)
        if dtype not in _DTYPES:
            why = "no contract says it" if entry is None else f'config.json has to name it: "dtype", found {dtype}'
            raise NoContractError(
                f"the dtype of the {kind} of {model.architectures[0]} in {engine.name} {engine.versions[0]} is not "
                f"known: {why}"
            )
        found[kind] = _DTYPES[dtype]
    hidden = _DTYPES.get(config.get("dtype", config.get("torch_dtype")), torch.bfloat16)
    return Arithmetic(topk, model.function, groups, group_topk, hidden, ties=engine.ties, **found)  # type: ignore[arg-type]


def route(
    hidden_TH: torch.Tensor,
    weight_EH: torch.Tensor,
    expert_bias_E: torch.Tensor | None,
    arithmetic: Arithmetic,
    bias_E: torch.Tensor | None = None,
) -> Routed:
    """Route tokens as an engine would. `bias_E`: of the linear layer that makes the logits."""
    logits_TE = logits(hidden_TH, weight_EH, bias_E, arithmetic)
    scores_TE = logits_TE.float()
    if arithmetic.function != "logits":
        scores_TE = scores_TE.sigmoid() if arithmetic.function == "sigmoid" else scores_TE.softmax(dim=-1)
    selection_TE = scores_TE
    biased = expert_bias_E is not None and arithmetic.expert_bias is not None
    if biased:
        selection_TE = scores_TE + expert_bias_E.to(arithmetic.expert_bias).float()  # type: ignore[union-attr]
    if arithmetic.groups and arithmetic.group_topk:
        grouped_TGE = selection_TE.view(selection_TE.shape[0], arithmetic.groups, -1)
        best_TG = grouped_TGE.topk(min(2 if biased else 1, grouped_TGE.shape[-1]), dim=-1).values.sum(dim=-1)
        allowed_TG = _best(best_TG, arithmetic.group_topk, arithmetic.ties)
        selection_TE = grouped_TGE.masked_fill(~allowed_TG.unsqueeze(-1), float("-inf")).view_as(selection_TE)
    return Routed(logits_TE, scores_TE, _best(selection_TE, arithmetic.topk, arithmetic.ties))


def logits(
    hidden_TH: torch.Tensor, weight_EH: torch.Tensor, bias_E: torch.Tensor | None, arithmetic: Arithmetic
) -> torch.Tensor:
    """[T, E] in the engine's dtype. The product is in this dtype if the weight has it too, else in fp32."""
    inner = arithmetic.logits if arithmetic.weight == arithmetic.logits else torch.float32
    hidden_TH, weight_EH = hidden_TH.to(arithmetic.hidden).to(inner), weight_EH.to(arithmetic.weight).to(inner)
    bias_E = None if bias_E is None or arithmetic.bias is None else bias_E.to(arithmetic.bias).to(inner)
    with true_fp32(), torch.autocast(hidden_TH.device.type, enabled=False):
        return torch.nn.functional.linear(hidden_TH, weight_EH, bias_E).to(arithmetic.logits)


def weights(scores_TE: torch.Tensor, chosen_TE: torch.Tensor, function: str, normalised: bool = True) -> torch.Tensor:
    """[T, E]: the weight of each expert's output, without the scaling factor; 0 where the expert was not chosen.

    `scores_TE`: as in Routed. `normalised`: the weights of a token add up to 1.
    """
    if function == "logits":
        return scores_TE.masked_fill(~chosen_TE, float("-inf")).softmax(dim=-1)
    kept_TE = scores_TE * chosen_TE
    return kept_TE / (kept_TE.sum(dim=-1, keepdim=True) + 1e-20) if normalised else kept_TE


def _best(values: torch.Tensor, number: int, ties: str) -> torch.Tensor:
    if ties == "lower":
        return largest(values, number)
    order = values.topk(number, dim=-1, sorted=False).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, order, True)
