"""One look at the routers of a rank: what is noted during the step, on the device, and the numbers read from it.

Shapes: L layers, E experts, T tokens, H hidden size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from megatron_fp32_router.casts.layer import layer_of
from megatron_fp32_router.casts.router import COUNTER, below_fp32
from megatron_fp32_router.gating.logits import score_watchers
from megatron_fp32_router.gating.schedule import capturing
from megatron_fp32_router.log import say
from megatron_fp32_router.monitor import bias, precision, stability
from megatron_fp32_router.monitor.expert_load import expert_load
from megatron_fp32_router.monitor.sinks import NOT_FINITE, Entry, Layer
from megatron_fp32_router.settings import SAMPLE
from megatron_fp32_router.wrapping.survey import routers_of

#: A mantissa below this is TF32 (11 bits with the hidden one), fp16 (11) or bf16 (8), not fp32 (24).
_FP32_BITS: Final = 20.0


def layers_of(model: Any) -> dict[Layer, tuple[str, Any]]:
    """Layer -> (module name, router): see layer_of; where Megatron has given it no number, the name.

    Args:
        model: a module, or a list of model chunks.
    """
    chunks: Iterable[Any] = model if isinstance(model, (list, tuple)) else [model]
    found: dict[Layer, tuple[str, Any]] = {}
    for chunk in chunks:
        for name, router in routers_of(chunk)[0]:
            layer: Layer = name if (number := layer_of(router, name)) is None else number
            while layer in found:  # two models in one training, say a student and its teacher
                layer = f"{layer} again"
            found[layer] = (name, router)
    return found


class Listener:
    """What a forward hook notes about one router during one step."""

    def __init__(self, router: Any, samples: bool) -> None:
        self.sample: stability.Sample | None = None
        self.counts_E: torch.Tensor | None = None
        self.scores_dtype: torch.dtype | None = None
        #: An error in the hook. It must not reach the training.
        self.error: Exception | None = None
        self._samples = samples and stability.obstacle(router) is None
        # Not the router itself: own_loop's weak dictionary from routers to listeners would then never let it go.
        self._id = id(router)
        self._handle = router.register_forward_hook(self._hook, with_kwargs=True)
        score_watchers.append(self._see_scores)

    def remove(self) -> None:
        """Take the hooks off."""
        self._handle.remove()
        score_watchers.remove(self._see_scores)

    def _see_scores(self, router: Any, scores: torch.Tensor) -> None:
        if id(router) == self._id:
            self.scores_dtype = scores.dtype

    def _hook(self, router: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        try:
            self._note(router, args, kwargs, output)
        except Exception as error:  # raised again in see(), outside the forward
            self.error = error

    def _note(self, router: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # Megatron does not count tokens of forwards without gradients: evaluation, and recomputation's first pass. A
        # traced or captured program would repeat for ever what the hook does.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or capturing():
            return
        hidden = (args[0] if args else kwargs["input"]).detach()
        chosen_TE = output[1].detach()
        is_map = chosen_TE.dtype == torch.bool
        if is_map and getattr(router, COUNTER, None) is None:
            counts_E = chosen_TE.sum(dim=0)
            self.counts_E = counts_E if self.counts_E is None else self.counts_E + counts_E
        if self._samples and self.sample is None:
            hidden_TH = hidden.reshape(-1, hidden.shape[-1])
            stride = max(1, hidden_TH.shape[0] // SAMPLE)
            same = is_map and chosen_TE.shape[0] == hidden_TH.shape[0] and stability.comparable(router)
            # Copies: activations are freed or overwritten before the look.
            kept_TE = chosen_TE[::stride][:SAMPLE].clone() if same else None
            self.sample = stability.Sample(hidden_TH[::stride][:SAMPLE].clone(), kept_TE)


def listen(layers: Mapping[Layer, tuple[str, Any]], samples: bool) -> dict[Layer, Listener]:
    """Put a hook on every router.

    Args:
        layers: as layers_of() has them.
        samples: whether this rank computes routing stability.
    """
    return {layer: Listener(router, samples) for layer, (_, router) in layers.items()}


@dataclass
class Seen:
    """One router at one look."""

    name: str
    router: Any
    #: Of every tensor, of the logits, and of the scores where the plugin's forward ran.
    dtypes: dict[str, torch.dtype]
    #: expert_bias before and after this step's update.
    before_E: torch.Tensor | None
    after_E: torch.Tensor | None = None
    #: int64, tokens of each expert: of this rank, or, when `reduced`, of all ranks that share a balance update.
    counts_E: torch.Tensor | None = None
    reduced: bool = False
    #: Whether an update of the bias was due in this step, for a router that is neither frozen nor in eval mode.
    updated: bool = False
    #: 0-dimensional fp64 tensors on the device; read() puts floats in their places.
    numbers: dict[str, Any] = field(default_factory=dict)
    #: What MEGATRON_FP32_ROUTER_MONITOR_RECORD asks for, on the device.
    recorded: Any = None


@dataclass
class Memory:
    """What is kept about one layer between looks."""

    #: Dtypes and step of the last look: a violation says what changed since.
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    step: int = 0
    probe: stability.Sample | None = None
    mean: float | None = None
    #: None: the caller gave no step.
    mean_step: int | None = None


def see(name: str, router: Any, listener: Listener | None, samples: bool, memory: Memory) -> Seen:
    """Everything about `router` that is there before its bias moves; nothing waits for the device."""
    if listener is not None and listener.error is not None:
        raise listener.error
    counter, expert_bias = getattr(router, COUNTER, None), getattr(router, "expert_bias", None)
    seen = Seen(name, router, precision.facts(router), None if expert_bias is None else expert_bias.detach().clone())
    if counter is not None:
        seen.counts_E = counter.to(torch.int64)
    elif listener is not None:
        seen.counts_E = listener.counts_E
    heard = listener.sample if listener is not None else None
    dtype = _input_dtype(router.config) if heard is None else heard.hidden_TH.dtype
    seen.numbers = {f"{NOT_FINITE}{name}": count for name, count in precision.not_finite(router).items()}
    if (measured := precision.probe(router, dtype)) is not None:
        seen.dtypes["logits"], seen.numbers["arithmetic"] = measured
    if listener is not None and listener.scores_dtype is not None:
        seen.dtypes["scores"] = listener.scores_dtype
    if samples:
        _see_stability(seen, listener, memory)
    return seen


def _see_stability(seen: Seen, listener: Listener | None, memory: Memory) -> None:
    if (why := stability.obstacle(seen.router)) is not None:
        say(logging.WARNING, f"the monitor computes no routing stability: {why}", once=True)
        return
    rule = stability.Rule(seen.router, seen.before_E)
    if memory.probe is not None:
        seen.numbers |= stability.changed(rule, memory.probe)
    if listener is None:
        return  # the process looks at its very first step: no hook was on yet
    if listener.sample is None:
        from megatron_fp32_router.monitor import findings

        findings.say_that_no_token_was_seen()
        return
    seen.numbers[f"{NOT_FINITE}input"] = precision.count_not_finite(listener.sample.hidden_TH)
    seen.numbers |= stability.stability(rule, listener.sample)
    if memory.probe is None:
        memory.probe = stability.new_probe(rule, listener.sample.hidden_TH)


def _input_dtype(config: Any) -> torch.dtype:
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32


def below(seen: Seen) -> list[str]:
    """The names of what is below fp32 against a promise, as far as that can be seen without waiting for the device."""
    return [name for name, kind in seen.dtypes.items() if below_fp32(kind) and precision.promised(seen.router, name)]


def read(seen: Iterable[Seen]) -> None:
    """Bring everything to the host: a few waits for the device, however many layers there are."""
    seen = list(seen)
    waiting = [(each.numbers, name) for each in seen for name in each.numbers]
    if waiting:
        values = torch.stack([numbers[name] for numbers, name in waiting]).tolist()
        for (numbers, name), value in zip(waiting, values, strict=True):
            numbers[name] = value
    for each in seen:
        each.after_E = None if each.before_E is None else each.router.expert_bias.detach()
    for name in ("before_E", "after_E", "counts_E"):
        having = [each for each in seen if getattr(each, name) is not None]
        tensors: list[torch.Tensor] = [getattr(each, name) for each in having]
        if len({tensor.dtype for tensor in tensors}) == 1:  # else there is none, or one layer of several was cast
            tensors = list(torch.split(torch.cat(tensors).cpu(), [tensor.numel() for tensor in tensors]))
        for each, tensor in zip(having, tensors, strict=True):
            setattr(each, name, tensor.cpu())


def entry(seen: Seen, memory: Memory, step: int | None) -> Entry:
    """The numbers and broken promises of one router, read() done; without those that need the counts of all ranks.

    `step`: the training step, or how many this process has made. None: not known, and nothing is said per step.
    """
    numbers = dict(seen.numbers)
    metrics = {f"precision/{name.replace('.', '_')}_bits": dtype.itemsize * 8.0 for name, dtype in seen.dtypes.items()}
    bits, error = None, numbers.pop("arithmetic", math.nan)
    if not math.isnan(error):
        bits = metrics["precision/arithmetic_bits"] = precision.bits_of(error, seen.dtypes["logits"])
    narrow = bits is not None and bits < _FP32_BITS and precision.promised(seen.router, "arithmetic")
    names, violations = below(seen), []
    if names or narrow:
        from megatron_fp32_router.monitor import findings

        steps = (step or 0) - memory.step
        violations = findings.violations(seen.name, seen.dtypes, names, bits if narrow else None, memory.dtypes, steps)
    memory.dtypes, memory.step = seen.dtypes, step or 0
    if any(value for name, value in numbers.items() if name.startswith(NOT_FINITE)):
        # Choices made from such numbers say nothing about precision, at this look or, as a probe, at the next.
        numbers = {name: value for name, value in numbers.items() if name.startswith(NOT_FINITE)}
        memory.probe = None
    if (biases := _finite_biases(seen)) is not None:
        known = step is not None and memory.mean_step is not None
        metrics |= bias.drift(biases[1], memory.mean, step - memory.mean_step if known else 0)  # type: ignore[operator]
        memory.mean, memory.mean_step = float(biases[1].double().mean()), step
    return {"metrics": _finite(metrics | numbers), "violations": violations}


def counted(seen: Seen) -> dict[str, float]:
    """The numbers that need the counts of all ranks."""
    if seen.counts_E is None or not seen.reduced:
        return {}
    metrics = expert_load(seen.counts_E.tolist())
    if seen.updated and (biases := _finite_biases(seen)) is not None:
        metrics |= bias.update(*biases, seen.counts_E, seen.router.config.moe_router_bias_update_rate)
    return _finite(metrics)


def count_own(entries: Mapping[Layer, Entry], seen: Mapping[Layer, Seen]) -> None:
    """Add the numbers that need counts to `entries` on a rank that is alone: its own counts are those of all ranks."""
    for layer, each in seen.items():
        each.reduced = True
        entries[layer]["metrics"].update(counted(each))


def _finite_biases(seen: Seen) -> tuple[torch.Tensor, torch.Tensor] | None:
    """expert_bias before and after the update, if there is one and all of it is finite."""
    if seen.before_E is None or seen.after_E is None:
        return None
    finite = bool(seen.before_E.isfinite().all() and seen.after_E.isfinite().all())
    return (seen.before_E, seen.after_E) if finite else None


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
