"""Inputs of the routers and what they decide with, in a file beside monitor.jsonl: what `parity` computes with.

One .npz a look and pipeline stage, read without unpickling. "recording": JSON, {"version", "step", "layers": [{"layer",
"topk", "score_function", "pre_softmax", "groups", "group_topk", "quantile"}]}. For the layer at place 0 of that list
"0/hidden" [T, H], "0/weight" [E, H] and, where the router has them, "0/bias" and "0/expert_bias" [E]: float32, as the
sampled forward had them. `quantile`: expert_bias is minus Megatron's qb_beta, and goes onto the logits.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch

from megatron_fp32_router.errors import Fp32RouterError
from megatron_fp32_router.log import rank, say
from megatron_fp32_router.monitor import sinks
from megatron_fp32_router.monitor.sinks import Layer
from megatron_fp32_router.monitor.stability import Rule, Sample
from megatron_fp32_router.patching.registry import registry

#: Looks that are kept.
KEPT: Final = 4
_VERSION: Final = 1


class RecordingError(Fp32RouterError):
    """Not a file with inputs of routers."""


@dataclass(frozen=True)
class Inputs:
    """What one router was given, and what it decides with; all tensors float32.

    Attributes:
        tensors: hidden [T, H], weight [E, H]; bias and expert_bias [E] where the router has them.
        topk: experts of each token.
        score_function: "sigmoid", "softmax" or "sqrtsoftplus".
        pre_softmax: softmax over all experts comes before the choice.
        groups, group_topk: of group-limited routing, or None.
        quantile: expert_bias is minus qb_beta.
    """

    tensors: Mapping[str, torch.Tensor]
    topk: int
    score_function: str
    pre_softmax: bool
    groups: int | None
    group_topk: int | None
    quantile: bool

    def rule(self) -> Rule:
        """The rule that the monitor computed with."""
        config = SimpleNamespace(
            moe_router_num_groups=self.groups,
            moe_router_group_topk=self.group_topk,
            moe_router_pre_softmax=self.pre_softmax,
        )
        expert_bias = self.tensors.get("expert_bias")
        router = SimpleNamespace(
            config=config,
            topk=self.topk,
            score_function=self.score_function,
            weight=self.tensors["weight"],
            bias=self.tensors.get("bias"),
            qb_beta=-expert_bias if self.quantile and expert_bias is not None else None,
        )
        return Rule(router, expert_bias)


def copied(router: Any, expert_bias: torch.Tensor | None, sample: Sample) -> Inputs:
    """What is to be recorded of a router, copied on its device; nothing waits for it."""
    rule, config = Rule(router, expert_bias), router.config
    hidden_TH, wanted = sample.hidden_TH, registry.settings.monitor_record
    hidden_TH = hidden_TH[:: max(1, hidden_TH.shape[0] // wanted)][:wanted]
    found = {"hidden": hidden_TH, "weight": rule.weight_EH, "bias": rule.linear_bias_E, "expert_bias": rule.bias_E}
    return Inputs(
        {name: tensor.float().clone() for name, tensor in found.items() if tensor is not None},
        rule.topk,
        rule.function,
        bool(config.moe_router_pre_softmax),
        rule.groups,
        rule.group_topk,
        getattr(router, "qb_beta", None) is not None,
    )


def write(step: int, stage: int, layers: Mapping[Layer, Inputs]) -> None:
    """Write one look of a pipeline stage, and remove what is older than the newest four. A full disk is a warning."""
    arrays: dict[str, Any] = {}
    said = []
    for place, (layer, inputs) in enumerate(layers.items()):
        arrays |= {f"{place}/{name}": tensor.cpu().numpy() for name, tensor in inputs.tensors.items()}
        rule = {each.name: getattr(inputs, each.name) for each in fields(inputs) if each.name != "tensors"}
        said.append({"layer": layer, **rule})
    arrays["recording"] = np.array(json.dumps({"version": _VERSION, "step": step, "layers": said}))
    folder = sinks.path().parent
    file = folder / f"inputs-{step:09d}-stage-{stage}.npz"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f".{file.name}").open("wb") as stream:
            np.savez(stream, **arrays)
        os.replace(folder / f".{file.name}", file)
        for old in sorted(folder.glob(f"inputs-*-stage-{stage}.npz"))[:-KEPT]:
            old.unlink()
    except OSError as error:
        what = f"the monitor cannot write inputs to {folder}, so some are missing there: {error}"
        say(logging.WARNING, what, once=True, speaker=rank())


def read(path: Path) -> tuple[int, dict[Layer, Inputs]]:
    """(step, inputs by layer) of a file, or of the newest look in a monitor's folder.

    Raises:
        RecordingError: there is none, or the file is not one; the message says what was expected and found.
    """
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("inputs-*-stage-*.npz"))
        if not files:
            raise RecordingError(f"{path}: expected inputs-*.npz, which MEGATRON_FP32_ROUTER_MONITOR_RECORD=N writes")
        newest = files[-1].name.partition("-stage")[0]
        files = [file for file in files if file.name.startswith(f"{newest}-stage")]
    step, found = 0, {}
    for file in files:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                root = json.loads(str(arrays["recording"]))
                if root["version"] != _VERSION:
                    raise ValueError(f"version {root['version']}, expected {_VERSION}")
                step = int(root["step"])
                for place, said in enumerate(root["layers"]):
                    layer = said.pop("layer")
                    found[layer] = _inputs(arrays, place, said)
        except OSError as error:
            raise RecordingError(f"{file}: cannot be read: {error}") from error
        except Exception as error:  # a damaged file can be damaged anywhere
            raise RecordingError(
                f"{file}: expected a file that MEGATRON_FP32_ROUTER_MONITOR_RECORD wrote, found "
                f"{type(error).__name__}: {error}"
            ) from error
    return step, found


def _inputs(arrays: Any, place: int, said: dict[str, Any]) -> Inputs:
    names = ("hidden", "weight", "bias", "expert_bias")
    tensors = {name: torch.from_numpy(arrays[f"{place}/{name}"]) for name in names if f"{place}/{name}" in arrays}
    experts, size = tensors["weight"].shape
    shapes = {"hidden": (len(tensors["hidden"]), size), "weight": (experts, size)}
    for name, tensor in tensors.items():
        expected = shapes.get(name, (experts,))
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != expected or not tensor.isfinite().all():
            raise ValueError(
                f"{name} of layer {place}: expected finite float32 {list(expected)}, found {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
    return Inputs(tensors, **said)
