"""MEGATRON_FP32_ROUTER_LIKE: round where a serving engine rounds. Imported only where it is set.

In reinforcement learning the experts that the rollout uses should be those that training uses. What an engine rounds is
in its contract (serving/contracts); the forward does the same, and gradients pass each rounding straight through.
Master weights and biases, their updates and their checkpoints stay as they are.

What is rounded: the weight (and the linear bias), the logits, and the expert bias in the choice of experts. Contracts
say nothing of the dtype of scores: they are computed in fp32 from the logits.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.autograd.function import once_differentiable

from megatron_fp32_router.errors import CannotMirrorError
from megatron_fp32_router.gating.linear import gradients, product
from megatron_fp32_router.log import say
from megatron_fp32_router.patching.registry import mismatch, runs, status
from megatron_fp32_router.serving.contracts import Engine, Entry, Model, NoContractError, find
from megatron_fp32_router.settings import PREFIX


@dataclass(frozen=True)
class Mirror:
    """Where one engine rounds. `entries`: what a contract says by "weight", "bias", "expert_bias", "logits"."""

    asked: str
    engine: str
    entries: Mapping[str, Entry]
    #: Cases on other hardware or back ends, which are not mirrored.
    elsewhere: tuple[str, ...]

    def dtype(self, kind: str, config: Any) -> torch.dtype:
        """What a `kind` becomes, in a model that is served in the dtype it trains in.

        Raises:
            CannotMirrorError: the engine has no such tensor.
        """
        entry = self.entries.get(kind)
        if entry is None:
            raise CannotMirrorError(
                f"{PREFIX}_LIKE={self.asked}: the routers of this model have {kind}, and {self.engine} has none in "
                f"this architecture, so nothing can be rounded like it. Expected one of {', '.join(self.entries)}: is "
                "this the architecture that the model is exported to?"
            )
        named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        if entry.dtype == "logits":
            return self.dtype("logits", config)
        return named.get(entry.dtype) or (torch.float16 if config.fp16 else torch.bfloat16)

    def logits(self, router: Any, input: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The engine's logits, in `dtype`, which holds them exactly."""
        config, bias = router.config, getattr(router, "bias", None)
        weight_dtype = self.dtype("weight", config)
        if bias is not None:
            self.dtype("bias", config)
        logits: torch.Tensor = _RoundedLinear.apply(  # type: ignore[no-untyped-call]
            input, router.weight, bias, dtype, weight_dtype, self.dtype("logits", config)
        )
        return logits

    @contextmanager
    def chooses(self, router: Any) -> Iterator[None]:
        """Inside, `router` chooses with the engine's expert bias."""
        master = getattr(router, "expert_bias", None)
        if master is None:
            yield
            return
        router.expert_bias = rounded(master, self.dtype("expert_bias", router.config))
        try:
            yield
        finally:
            router.expert_bias = master

    def refuse(self, router: Any, input: torch.Tensor) -> NoReturn:
        """Raise for a forward that the plugin leaves to upstream."""
        raise CannotMirrorError(
            f"{PREFIX}_LIKE={self.asked}: expected TopKRouters of a model in bf16 or fp16, found "
            f"{type(router).__qualname__} with {input.dtype}. Unset it for this training."
        )

    def announce(self, routers: Iterable[Any], owners: Iterable[str]) -> None:
        """Say in full what is rounded, once.

        Args:
            routers: the TopKRouters of a model that has just been wrapped.
            owners: functions of their own that they have in the place of ours.

        Raises:
            CannotMirrorError: it would not be in effect, or this is not a model that the engine could have.
        """
        for router in routers:
            for kind in ("weight", "bias", "expert_bias"):
                if getattr(router, kind, None) is not None:
                    self.dtype(kind, router.config)
            if getattr(router.config, "moe_router_dtype", None) == "fp64":
                raise CannotMirrorError(
                    f"{PREFIX}_LIKE={self.asked}: no engine computes in fp64, and moe_router_dtype asks for it. "
                    "Unset one of the two."
                )
        lost = set(owners) | {
            f"{record.target}: {record.detail}"
            for record in status()
            if record.id in ("gating", "router-output") and not runs(record.id)
        }
        if lost:
            mismatch(
                CannotMirrorError,
                f"{PREFIX}_LIKE={self.asked} would not be in effect: in the place of the plugin's functions there is "
                f"{'; '.join(sorted(lost))}. Let it call the original, or unset {PREFIX}_LIKE.",
            )
        say(logging.WARNING, str(self), once=True)

    def __str__(self) -> str:
        """What is rounded to what, for the log."""
        names = {"model": "the model's dtype", "logits": "the logits' dtype"}
        said = ", ".join(
            f"{kind} {names.get(entry.dtype, entry.dtype)} ({entry.source})" for kind, entry in self.entries.items()
        )
        other = f" Not mirrored: {'; '.join(self.elsewhere)}." if self.elsewhere else ""
        return (
            f"{PREFIX}_LIKE={self.asked}: routers round where {self.engine} does, so THEIR DECISIONS ARE NOT FP32: "
            f"{said}. Gradients pass the roundings straight through; what is trained and saved stays as it is. Scores "
            f"are fp32, from these logits.{other}"
        )


def mirror(asked: str) -> Mirror:
    """What `ENGINE==VERSION/ARCHITECTURE` names, with `?KEY=VALUE&…` for keys of config.json that an engine looks at.

    Raises:
        NoContractError: nothing is known of it; the message lists what is.
        CannotMirrorError: what is known is not enough.
    """
    name, _, said = asked.partition("?")
    wanted, _, architecture = name.partition("/")
    engine = find(wanted)
    model = _model(engine, architecture)
    every = [entry for entries in model.tensors.values() for entry in entries]
    keys = sorted({key for entry in every for key in entry.config})
    config = dict(_value(pair) for pair in said.split("&") if pair)
    if unknown := sorted(config.keys() - set(keys)):
        raise CannotMirrorError(
            f"{PREFIX}_LIKE={asked}: {engine.name} does not look at {', '.join(unknown)} for {model.name}; known are "
            f"{', '.join(keys) or 'no keys'}"
        )
    by = f"{engine.name} {engine.versions[0]}"
    entries = {kind: entry for kind in model.tensors if (entry := _usual(model, kind, config)) is not None}
    if missing := [kind for kind in ("weight", "logits") if kind not in entries]:
        raise CannotMirrorError(
            f"{PREFIX}_LIKE={asked}: what {by} makes of the {' and '.join(missing)} of {model.name} is not known"
        )
    if "bias" in entries and entries["bias"].dtype != entries["weight"].dtype:
        raise CannotMirrorError(f"{PREFIX}_LIKE={asked}: weight and linear bias have different dtypes in {by}")
    elsewhere = tuple(
        f"{kind} {entry.dtype} with {entry.where}" for kind in entries for entry in model.elsewhere(kind, config)
    )
    return Mirror(asked, by, entries, elsewhere)


def _usual(model: Model, kind: str, config: Mapping[str, Any]) -> Entry | None:
    usual = model.usual(kind, config)
    if usual is None and kind == "expert_bias":
        # This training has one, so its export asks the engine to use it: `audit --for` looks whether it does.
        usual = next((entry for entry in model.tensors[kind] if not entry.where), None)
    return usual


def _model(engine: Engine, architecture: str) -> Model:
    """By config.json's architecture, or by its model_type: "DeepseekV3ForCausalLM" or "deepseek_v3"."""
    for model in engine.models:
        if any(_short(architecture) == _short(name) for name in model.architectures):
            return model
    try:
        return engine.model(architecture)
    except NoContractError as error:
        raise NoContractError(f"{PREFIX}_LIKE: {error}") from None


def _short(architecture: str) -> str:
    return architecture.lower().replace("_", "").removesuffix("forcausallm")


def _value(pair: str) -> tuple[str, Any]:
    key, _, value = pair.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


# Rounding --------------------------------------------------------------------------------------------------------


def rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest values of `dtype`, in the dtype that `tensor` has."""
    return tensor.detach().to(dtype).to(tensor.dtype)


def rounded_logits(
    tokens_TH: torch.Tensor,
    weight_EH: torch.Tensor,
    bias_E: torch.Tensor | None,
    weight_dtype: torch.dtype,
    logits_dtype: torch.dtype,
) -> torch.Tensor:
    """[T, E] in `logits_dtype`, as an engine computes them.

    Where weight and logits have one dtype below fp32, by the library's product in it. Otherwise in fp32, rounded once.
    """
    weight_EH = weight_EH.to(weight_dtype)
    bias_E = None if bias_E is None else bias_E.to(weight_dtype)
    if weight_dtype == logits_dtype != torch.float32:
        with torch.autocast(tokens_TH.device.type, enabled=False):
            return torch.nn.functional.linear(tokens_TH.to(weight_dtype), weight_EH, bias_E)
    return product(tokens_TH, weight_EH, bias_E, torch.float32).to(logits_dtype)


class _RoundedLinear(torch.autograd.Function):
    """RouterLinear with an engine's roundings in the forward. The input's gradient is that of the rounded weight."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        weight_dtype: torch.dtype,
        logits_dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        ctx.dtype, ctx.weight_dtype = dtype, weight_dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        logits_TE = rounded_logits(input.reshape(-1, input.shape[-1]), weight, bias, weight_dtype, logits_dtype)
        return logits_TE.to(dtype).view(*input.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        return (*gradients(ctx, input, rounded(weight, ctx.weight_dtype), grad_outputs[0]), None, None, None)
