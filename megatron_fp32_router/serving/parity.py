"""How many tokens does an engine send to other experts than the training? Imports torch, but no Megatron or engine.

Shapes: T tokens, H hidden size, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch

from megatron_fp32_router.errors import Fp32RouterError
from megatron_fp32_router.monitor.stability import Sample, stability
from megatron_fp32_router.serving import engine as emulation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from megatron_fp32_router.monitor.recording import Inputs
    from megatron_fp32_router.monitor.sinks import Layer
    from megatron_fp32_router.serving.contracts import Engine
    from megatron_fp32_router.serving.engine import Arithmetic

#: What may differ in an engine. "choice": nothing is rounded, but score function, groups and ties are the engine's.
PARTS: Final = ("hidden", "weight", "bias", "expert_bias", "logits", "choice")

#: What must be the same in a training and in config.json: (what, its possible keys in config.json).
_SAME: Final = (
    ("experts", ("n_routed_experts", "num_experts", "num_local_experts")),
    ("experts of each token", ("num_experts_per_tok",)),
    ("hidden size", ("hidden_size",)),
    ("groups", ("n_group",)),
    ("groups of each token", ("topk_group",)),
)


class ParityError(Fp32RouterError):
    """The recorded routers are not those of the model in config.json."""


def monitored(inputs: Inputs) -> dict[str, float]:
    """The share of tokens that each of the monitor's roundings sends to other experts: its flips/…"""
    found = stability(inputs.rule(), Sample(inputs.tensors["hidden"], None))
    return {name.partition("/")[2]: float(value) for name, value in found.items() if name.startswith("flips/")}


def served(inputs: Inputs, engine: Engine, config: Mapping[str, Any]) -> dict[str, Any]:
    """Route the inputs of one router as one engine does, and compare with the training.

    Returns:
        {"arithmetic": {"weight": "bfloat16", …}, "together": difference, "alone": {part: difference}}: with all of the
        engine's arithmetic, and with one part of it and the rest exact, for each part that is not exact there. A
        difference is {"tokens": how many have another set of experts, "experts": how many changed, "weight": the
        largest difference of an expert's weight, "weight_same_experts": the same among tokens with the same experts}.

    Raises:
        ParityError: these are not the routers that config.json describes.
        NoContractError: from `arithmetic_of`.
    """
    arithmetic = emulation.arithmetic_of(engine, config, inputs.topk, inputs.groups, inputs.group_topk)
    _check(inputs, config, arithmetic.function)
    reference_TE, weights_TE = _trained(inputs)
    exact = emulation.Arithmetic(
        inputs.topk, arithmetic.function, inputs.groups, inputs.group_topk, ties=arithmetic.ties
    )

    def difference(how: Arithmetic) -> dict[str, float]:
        tensors = inputs.tensors
        routed = emulation.route(
            tensors["hidden"], tensors["weight"], tensors.get("expert_bias"), how, tensors.get("bias")
        )
        there_TE = emulation.weights(routed.scores_TE, routed.chosen_TE, how.function, _normalised(inputs))
        differs_T = (routed.chosen_TE != reference_TE).any(dim=-1)
        error_T = (there_TE - weights_TE).abs().amax(dim=-1)
        return {
            "tokens": int(differs_T.sum()),
            "experts": int((routed.chosen_TE & ~reference_TE).sum()),
            "weight": float(error_T.max()),
            "weight_same_experts": float(error_T.masked_fill(differs_T, 0).max()),
        }

    said = {part: getattr(arithmetic, part) for part in PARTS[:-1]}
    there = [part for part in said if part not in ("bias", "expert_bias") or part in inputs.tensors]
    alone = {
        part: difference(replace(exact, ties="lower", **{part: said[part]}))
        for part in there
        if said[part] != torch.float32
    }
    return {
        "arithmetic": {part: _name(said[part]) for part in there},
        "together": difference(arithmetic),
        "alone": {**alone, "choice": difference(exact)},
    }


def _name(dtype: torch.dtype | None) -> str:
    return "not used" if dtype is None else str(dtype).removeprefix("torch.")


def _normalised(inputs: Inputs) -> bool:
    """Whether the weights of a token add up to 1 in training. The engine is assumed to do the same."""
    return not inputs.pre_softmax if inputs.score_function == "softmax" else inputs.topk > 1


def _trained(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Which experts the training chose, bool [T, E], and their weights in fp32, [T, E]."""
    rule = inputs.rule()
    scores_TE = rule.scores(rule.logits(inputs.tensors["hidden"]))
    chosen_TE = rule.chosen(rule.biased(scores_TE))
    function = "logits" if rule.by_logits else inputs.score_function
    return chosen_TE, emulation.weights(scores_TE, chosen_TE, function, _normalised(inputs))


def _check(inputs: Inputs, config: Mapping[str, Any], function: str) -> None:
    """Refuse routers that are not those of config.json. Keys that it lacks are not compared."""
    experts, hidden = inputs.tensors["weight"].shape
    trained = (experts, inputs.topk, hidden, inputs.groups or 1, inputs.group_topk if inputs.groups else None)
    for (what, keys), value in zip(_SAME, trained, strict=True):
        said = next((config[key] for key in keys if config.get(key) is not None), value)
        if value is not None and said != value:
            raise ParityError(f"{what}: config.json says {said}, and the recorded router has {value}")
    if inputs.quantile or inputs.score_function != ("sigmoid" if function == "sigmoid" else "softmax"):
        what = "quantile balancing" if inputs.quantile else f"the score function {inputs.score_function}"
        raise ParityError(
            f"trained with {what}, and the engine's {config['architectures'][0]} chooses by {function}: it is not the "
            "same model"
        )


def parity(
    layers: Mapping[Layer, Inputs], engines: list[Engine], config: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """One record a layer: {"layer", "tokens", "experts", "topk", "monitor": …, "engines": {name: …}}."""
    return [
        {
            "layer": layer,
            "tokens": len(inputs.tensors["hidden"]),
            "experts": inputs.tensors["weight"].shape[0],
            "topk": inputs.topk,
            "monitor": monitored(inputs),
            "engines": {
                f"{engine.engine}=={engine.versions[0]}": served(inputs, engine, config or {}) for engine in engines
            },
        }
        for layer, inputs in layers.items()
    ]
