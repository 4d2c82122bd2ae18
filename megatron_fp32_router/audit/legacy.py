"""Megatron's `torch` format: one archive per model-parallel rank, `mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`.

A router is the same on every tensor- and expert-parallel rank, so only the first rank's is read. Layer numbers start
from 0 in every pipeline stage and every stack (`decoder.layers`, `mtp.layers`). Here they are given the numbers that
they have in the whole model. `distrib_optim.pt`, where the distributed optimizer wrote one, holds main copies of all
parameters without their names.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from megatron_fp32_router.audit.files import unreadable
from megatron_fp32_router.audit.main_copies import Flat, buffers_in, walk
from megatron_fp32_router.audit.pickles import TensorRef
from megatron_fp32_router.audit.tensors import Checkpoint, RouterTensor, argument, kind_of, read_arguments
from megatron_fp32_router.audit.torch_zip import Archive

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import ExitStack
    from pathlib import Path

    from megatron_fp32_router.audit.files import Meter

_RANK: Final = re.compile(r"^mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?$")

#: A name in three parts: up to and with its stack ("decoder.layers."), the layer's number, and the rest.
_LAYER: Final = re.compile(r"^((?:.*?\.)?layers\.)(\d{1,9})(\..*)$", re.DOTALL)


def read_legacy(files: list[Path], meter: Meter, stack: ExitStack) -> tuple[Checkpoint, list[Flat]]:
    """Router tensors of all pipeline stages, and buffers that may hold main copies. Archives stay open in `stack`."""
    stages: dict[tuple[int, int], tuple[Archive, dict[str, TensorRef]]] = {}
    buffers: list[Flat] = []
    checkpoint = Checkpoint(files[0].parent, "legacy torch")
    seen: set[int] = set()
    for file in sorted(files):
        stage = _stage(file, None)
        if stage in seen or not _first_copy(file):
            continue
        archive = stack.enter_context(Archive(file, meter))
        root = archive.root
        if not isinstance(root, dict):
            raise unreadable(file, "a dictionary, as Megatron saves it", type(root).__name__)
        read_arguments(checkpoint, root)
        pipeline = argument(root, "pipeline_model_parallel_size")
        stage = _stage(file, pipeline)
        if stage in seen:
            continue
        seen.add(stage)
        for key, part in root.items():
            found = re.match(r"^model(\d*)$", key) if isinstance(key, str) else None
            if found is not None and isinstance(part, dict):
                stages[int(found[1] or 0), stage] = archive, dict(_named(part))
        buffers += buffers_in(archive, root.get("optimizer"))
        extra = file.parent / "distrib_optim.pt"
        if extra.exists():
            optimizer = stack.enter_context(Archive(extra, meter))
            buffers += buffers_in(optimizer, optimizer.root)
    if not stages:
        raise unreadable(files[0], "a `model` entry with Megatron's parameters", "none")
    before = Counter[str]()
    for _, (archive, names) in sorted(stages.items()):
        layers = Counter[str]()
        for name in names:
            if (found := _LAYER.match(name)) is not None:
                layers[found[1]] = max(layers[found[1]], int(found[2]) + 1)
        for name, ref in names.items():
            kind = kind_of(name)
            if kind is not None:
                counted = _counted(name, before)
                checkpoint.tensors.append(RouterTensor(counted, kind, ref.dtype, ref.shape, archive.tensor(ref)))
        before += layers
    return checkpoint, buffers


def _counted(name: str, before: Counter[str]) -> str:
    """A name with its layer's number in the whole model. `before`: layers of each stack in earlier stages."""
    found = _LAYER.match(name)
    return name if found is None else f"{found[1]}{int(found[2]) + before[found[1]]}{found[3]}"


def _first_copy(file: Path) -> bool:
    """Whether this is the first tensor-parallel rank's; so is a file whose folder names no rank."""
    rank = _RANK.match(file.parent.name)
    return rank is None or int(rank[1]) == 0


def _stage(file: Path, pipeline: Any) -> int:
    """The pipeline stage in a folder's name. A second number alone is the expert rank if `pipeline`, its size, is 1."""
    rank = _RANK.match(file.parent.name)
    if rank is None or rank[2] is None or (rank[3] is None and pipeline == 1):
        return 0
    return int(rank[2])


def _named(root: dict[Any, Any]) -> Iterator[tuple[str, TensorRef]]:
    """(dotted name, tensor) of a nested state dict."""
    for path, value in walk(root):
        if isinstance(value, TensorRef) and all(isinstance(part, str) for part in path):
            yield ".".join(path), value
