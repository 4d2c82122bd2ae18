"""Real text to train on that every machine has: the sources of Python's own standard library, as bytes."""

from __future__ import annotations

import functools
import random
import sysconfig
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_fp32_router.lab.recipe import LabError, Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Enough for thousands of steps of a tiny model; reading it takes milliseconds.
_CORPUS_BYTES = 4_000_000


@functools.cache
def corpus() -> bytes:
    """The standard library's top-level sources in name order, cut at 4 MB.

    Raises:
        LabError: this Python has no sources on disk.
    """
    home = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(home.glob("*.py")))
    if len(text) < 100_000:
        raise LabError(f"no standard library sources to train on in {home}")
    return text[:_CORPUS_BYTES]


def text_batches(recipe: Recipe, seed: int) -> Iterator[dict[str, Any]]:
    """Endless micro-batches: the same for the same seed, different for each data-parallel rank.

    Yields:
        `tokens`, `labels`, `position_ids`: int64 [micro_batch, seq_length]; `loss_mask`: fp32, ones, same shape;
        `attention_mask`: bool [1, 1, seq_length, seq_length], True where attention is forbidden.
    """
    from megatron_fp32_router.lab.groups import device

    text = corpus()
    replica = 0
    if dist.is_initialized():
        replica = import_module("megatron.core.parallel_state").get_data_parallel_rank()
    choose = random.Random(f"{seed}/{replica}")
    length, where = recipe.seq_length, device()
    positions = torch.arange(length, device=where).expand(recipe.micro_batch, length).contiguous()
    ones = torch.ones(recipe.micro_batch, length, device=where)
    mask = torch.triu(torch.ones(length, length, device=where), diagonal=1).bool()[None, None]
    while True:
        rows = []
        for _ in range(recipe.micro_batch):
            start = choose.randrange(len(text) - length - 1)
            rows.append(list(text[start : start + length + 1]))
        window = torch.tensor(rows, dtype=torch.int64, device=where) % recipe.vocab
        yield {
            "tokens": window[:, :-1].contiguous(),
            "labels": window[:, 1:].contiguous(),
            "position_ids": positions,
            "attention_mask": mask,
            "loss_mask": ones,
        }
