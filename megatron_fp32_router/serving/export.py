"""The questions about an export before it is served: is it what was trained, and what will the engine make of it?"""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_fp32_router.audit import bits
from megatron_fp32_router.audit.compare import identical
from megatron_fp32_router.audit.files import Meter, read_json, shown, unreadable
from megatron_fp32_router.audit.finding import Finding
from megatron_fp32_router.audit.tensors import SERVED

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from megatron_fp32_router.audit.tensors import Checkpoint, RouterTensor
    from megatron_fp32_router.serving.contracts import Engine, Model


def read_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json of an export. Raises as `config_in`."""
    return config_in(checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent)


def config_in(path: Path) -> dict[str, Any]:
    """A config.json, or the one in a folder.

    Raises:
        CheckpointUnreadableError: there is none, or it does not say which architecture this is.
    """
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise unreadable(path, "the config.json of an export to Hugging Face's format, which --for is about", "none")
    config = read_json(path, Meter(), 1 << 24)
    names = config.get("architectures") if isinstance(config, dict) else None
    if not (isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)):
        raise unreadable(path, '"architectures" with one name', shown(names))
    found: dict[str, Any] = config
    return found


def questions(
    checkpoint: Checkpoint, against: Checkpoint | None, engines: Sequence[Engine], config: dict[str, Any]
) -> list[Finding]:
    """All answers about an export, for these engines. `config`: from `read_config`.

    Raises:
        NoContractError: an engine has no contract for this architecture.
    """
    models = [(engine, engine.model(config["architectures"][0])) for engine in engines]
    trained = {} if against is None else {tensor.key: tensor for tensor in against.tensors if tensor.kind in SERVED}
    found = _missing(checkpoint, trained, models, config)
    for tensor in checkpoint.tensors:
        if tensor.kind not in SERVED:
            continue
        if against is not None:
            found.append(_as_trained(tensor, trained.get(tensor.key)))
        if tensor.kind == "expert_bias" and tensor.values is not None and not np.any(tensor.values.astype(np.float64)):
            found.append(_zero(tensor, trained.get(tensor.key)))
        found += [_served(tensor, engine, model, config) for engine, model in models]
    for engine, model in models:
        found += _of_the_model(engine, model, config)
    return found


def _missing(
    checkpoint: Checkpoint,
    trained: dict[tuple[str, int, str], RouterTensor],
    models: Sequence[tuple[Engine, Model]],
    config: dict[str, Any],
) -> list[Finding]:
    """Missing router tensors: of those that training has, an engine reads, or a layer with experts needs."""
    here = {tensor.key: tensor.name for tensor in checkpoint.tensors}
    wanted: dict[tuple[str, int, str], str] = {
        ("decoder", layer, "weight"): "this layer has experts" for layer in checkpoint.expert_layers
    }
    for stack, layer, kind in here:
        if kind != "weight":
            continue
        for engine, model in models:
            for other in ("bias", "expert_bias"):
                if model.usual(other, config) is not None:
                    wanted[stack, layer, other] = f"{engine.name} reads one for {model.architectures[0]}"
    wanted |= dict.fromkeys(trained, "it is in the training's checkpoint")
    found = []
    for key, why in wanted.items():
        if key not in here:
            stack, layer, kind = key
            text = f"missing: {why}, and the export has none"
            if kind == "expert_bias":
                text += ". Converters that do not know it leave it out (Megatron-Bridge #4199, #4657)"
            name = next((n for (s, la, _), n in here.items() if (s, la) == (stack, layer)), f"{stack}.layers.{layer}")
            name = f"{name.rpartition('.')[0]}.{kind}" if name in here.values() else f"{name}.router.{kind}"
            found.append(Finding(name, "serving", "problem", text, {"missing": kind, "layer": layer}))
    return found


def _as_trained(tensor: RouterTensor, trained: RouterTensor | None) -> Finding:
    """Are these the values that were trained, bit for bit?"""
    found = partial(Finding, tensor.name, "serving")
    if trained is None or trained.values is None or tensor.values is None or trained.shape != tensor.shape:
        other = "none" if trained is None else f"{trained.dtype} {trained.shape}"
        return found("unknown", f"cannot be compared with training: {tensor.dtype} {tensor.shape} here, {other} there")
    if identical(tensor, trained):
        return found("good", "the same as in training, bit for bit")
    differ = int((tensor.values.astype(np.float64) != trained.values.astype(np.float64)).sum())
    if differ == 0:
        return found("good", f"the values of training, in {tensor.dtype} instead of {trained.dtype}")
    cast = np.array_equal(bits.rounded(trained.values, tensor.values.dtype), tensor.values)
    how = f": rounded from {trained.dtype} to {tensor.dtype} on the way" if cast else ""
    return found("problem", f"not what was trained: {differ:,} of {tensor.values.size:,} values differ{how}")


def _zero(tensor: RouterTensor, trained: RouterTensor | None) -> Finding:
    if trained is not None and trained.values is not None and not np.any(trained.values):
        return Finding(tensor.name, "serving", "good", "every bias is zero, as in training")
    return Finding(
        tensor.name,
        "serving",
        "problem",
        "every bias is zero: converters that do not know the bias leave it at zero (Megatron-Bridge #4199, #4657)",
    )


def _served(tensor: RouterTensor, engine: Engine, model: Model, config: dict[str, Any]) -> Finding:
    """What one engine makes of one tensor."""
    by = f"{engine.name} {engine.versions[0]}"
    data: dict[str, Any] = {"engine": engine.engine, "from": tensor.dtype}
    found = partial(Finding, tensor.name, "serving", data=data)
    entry = model.usual(tensor.kind, config)
    if entry is None:
        needs = next((e.config for e in model.tensors.get(tensor.kind, ()) if not e.where), None)
        if needs is None:
            return found("unknown", f"{by}: no contract for a router's {tensor.kind} of {model.architectures[0]}")
        asked = ", ".join(f"{key} = {json.dumps(value)}" for key, value in needs.items())
        has = ", ".join(f"{key} = {shown(config.get(key))}" for key in needs)
        return found("problem", f"{by} does not use it: that needs {asked} in config.json, found {has}")
    dtype = data["to"] = model.resolved(entry, config)
    if dtype is None:
        return found("unknown", f"{by} loads it in the model's dtype ({entry.source}), which config.json does not name")
    others = _others(tensor.kind, dtype, model, config)
    if tensor.dtype == dtype:
        return found("good", f"stays {dtype} in {by} ({entry.source}){others}")
    text = f"{tensor.dtype} → {dtype} by {by} ({entry.source})"
    if tensor.values is None or dtype not in (*bits.CASTS, "float32"):
        return found("unknown", text + others)
    narrow = tensor.values.astype(np.float32)
    if dtype in bits.CASTS:
        narrow = bits.rounded(tensor.values, dtype)
    changed = int((narrow.astype(np.float64) != tensor.values.astype(np.float64)).sum())
    data["changed"] = changed
    if not changed:
        return found("good", f"{text}: no value changes{others}")
    text += f": {changed:,} of {narrow.size:,} values change"
    if tensor.kind == "expert_bias":
        text += f", {bits.distinct(tensor.values)} different ones become {bits.distinct(narrow)}"
    if entry.switch:
        text += f"; fp32 by {entry.switch}"
    return found("problem", text + others)


def _others(kind: str, usual: str, model: Model, config: dict[str, Any]) -> str:
    """What it becomes on other hardware or back ends, where that differs."""
    cases = [
        f"{model.resolved(entry, config) or 'the dtype of the ' + entry.dtype} ({entry.where}: {entry.source})"
        for entry in model.elsewhere(kind, config)
        if model.resolved(entry, config) != usual
    ]
    return f"; {'; '.join(cases)}" if cases else ""


def _of_the_model(engine: Engine, model: Model, config: dict[str, Any]) -> list[Finding]:
    """What holds for the engine and the architecture, whatever the tensors are: logits and notes."""
    by, said = f"{engine.name} {engine.versions[0]}", []
    entry = model.usual("logits", config)
    if entry is None:
        said.append(f"{by}: the dtype of the logits of {model.architectures[0]} is not known")
    else:
        dtype = model.resolved(entry, config) or "the model's dtype"
        text = f"{by} computes the logits of {model.architectures[0]} in {dtype} ({entry.source})"
        text += _others("logits", dtype, model, config)
        said.append(f"{text}; {entry.switch}" if entry.switch else text)
    if model.notes:
        said.append(f"{by}: {model.notes}")
    said.append(f"{by}: {engine.established}")
    return [Finding("", "serving", "note", text, {"engine": engine.engine}) for text in said]
