"""In which dtypes engines keep a router's tensors: the contracts, one file in contracts/ for each engine.

A contract holds only for the versions that it lists. It quotes every line of the engine's source that it rests on:
`scripts/contracts verify` looks whether a wheel still has them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from megatron_fp32_router.errors import Fp32RouterError

if TYPE_CHECKING:
    from collections.abc import Mapping


class NoContractError(Fp32RouterError):
    """What this engine, in this version, makes of this model has not been established."""


@dataclass(frozen=True)
class Source:
    """A place in an engine's source. `quote`: consecutive lines without indentation."""

    file: str
    quote: tuple[str, ...]
    #: The first line; None where only the function is known.
    line: int | None = None
    function: str = ""

    def __str__(self) -> str:
        return f"{self.file.rpartition('/')[2]}:{self.line or self.function}"


@dataclass(frozen=True)
class Entry:
    """What a tensor becomes in one case."""

    #: "float32" or "bfloat16"; "model": the dtype the model is loaded in; "logits": that of the logits.
    dtype: str
    source: Source
    #: Keys of config.json that must have these values; None also stands for an absent key.
    config: Mapping[str, Any] = field(default_factory=dict)
    #: The hardware or back end this case is for; "" for the usual one.
    where: str = ""
    #: What makes it fp32, for people.
    switch: str = ""

    def applies(self, config: Mapping[str, Any]) -> bool:
        """Whether this is the case for a model with this config.json."""
        return all(config.get(key) == value for key, value in self.config.items())


@dataclass(frozen=True)
class Model:
    """A contract for one architecture. `tensors`: the cases of "weight", "bias", "expert_bias" and "logits"."""

    name: str
    architectures: tuple[str, ...]
    tensors: Mapping[str, tuple[Entry, ...]]
    #: What turns logits into scores: "sigmoid" or "softmax".
    function: str
    notes: str = ""
    rests_on: tuple[str, ...] = ()

    def resolved(self, entry: Entry, config: Mapping[str, Any]) -> str | None:
        """The dtype that an entry stands for with this config.json; None: config.json does not name one."""
        if entry.dtype == "logits":
            usual = self.usual("logits", config)
            return None if usual is None else self.resolved(usual, config)
        if entry.dtype != "model":
            return entry.dtype
        said = config.get("dtype", config.get("torch_dtype"))
        return said if isinstance(said, str) else None

    def usual(self, kind: str, config: Mapping[str, Any]) -> Entry | None:
        """The case for this config.json on usual hardware; None: the engine then has no such tensor."""
        entries = self.tensors.get(kind, ())
        return next((entry for entry in entries if not entry.where and entry.applies(config)), None)

    def elsewhere(self, kind: str, config: Mapping[str, Any]) -> list[Entry]:
        """The cases on other hardware or back ends."""
        return [entry for entry in self.tensors.get(kind, ()) if entry.where and entry.applies(config)]


@dataclass(frozen=True)
class Engine:
    """One engine's contracts. `sources` holds every quoted place by its name in the file."""

    engine: str
    name: str
    versions: tuple[str, ...]
    established: str
    models: tuple[Model, ...]
    sources: Mapping[str, Source]
    loading: Source
    #: Which of several experts with equal scores is chosen: the "lower" one, or the one that "torch.topk" takes.
    ties: str

    def model(self, architecture: str) -> Model:
        """Raises NoContractError: nothing is known of this architecture."""
        for model in self.models:
            if architecture in model.architectures:
                return model
        known = ", ".join(name for model in self.models for name in model.architectures)
        raise NoContractError(
            f"no contract for {architecture} in {self.name} {', '.join(self.versions)}: what it makes of this router "
            f"is not known; known are {known}"
        )


@lru_cache(maxsize=1)
def engines() -> dict[str, Engine]:
    """All engines by name."""
    contracts = [file for file in (files(__package__) / "contracts").iterdir() if file.name.endswith(".json")]
    found = [_engine(json.loads(file.read_text(encoding="utf-8"))) for file in contracts]
    return {engine.engine: engine for engine in sorted(found, key=lambda engine: engine.name.lower())}


def _engine(root: dict[str, Any]) -> Engine:
    sources = {
        name: Source(said["file"], tuple(said["quote"]), said.get("line"), said.get("in", ""))
        for name, said in root["sources"].items()
    }
    models = tuple(
        Model(
            said["name"],
            tuple(said["architectures"]),
            {
                kind: tuple(Entry(**{**entry, "source": sources[entry["source"]]}) for entry in said[kind])
                for kind in ("weight", "bias", "expert_bias", "logits")
                if kind in said
            },
            said["function"],
            said.get("notes", ""),
            tuple(said.get("rests_on", ())),
        )
        for said in root["models"]
    )
    return Engine(
        root["engine"],
        root["name"],
        tuple(root["versions"]),
        root["established"],
        models,
        sources,
        sources[root["loading"]],
        root["ties"],
    )


def find(asked: str) -> Engine:
    """The engine that "vllm==0.33.0" names.

    Raises:
        NoContractError: an engine or version that nothing is known of; the message lists what is.
    """
    name, _, version = asked.partition("==")
    engine = engines().get(name.strip().lower().replace("_", "-"))
    if engine is not None and version.strip() in engine.versions:
        return replace(engine, versions=(version.strip(),))
    known = ", ".join(f"{known.engine}=={version}" for known in engines().values() for version in known.versions)
    raise NoContractError(
        f"no contract for {asked.strip() or 'an engine without a name'}: what it makes of a router is not known, and "
        f"another version may differ; known are {known}"
    )
