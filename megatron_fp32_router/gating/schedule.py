"""When a step begins and ends: one call of Megatron's own schedule. For split_cache.py, which says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_fp32_router.patching.registry import replaces


class Step:
    """What is kept during one call of a schedule."""

    def __init__(self, captured: bool) -> None:
        #: Whether the whole call is being captured into a CUDA graph.
        self.captured = captured
        #: key -> the weight (held, so that no other can take its id), its version, its parts.
        self.kept: dict[tuple[Any, ...], tuple[torch.Tensor, int, torch.Tensor]] = {}


#: The innermost schedule that runs now. One for the process: autograd's threads work for the schedule as well.
running: list[Step] = []


def capturing() -> bool:
    """Whether what runs now is being recorded into a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@contextmanager
def one_step() -> Iterator[None]:
    """Weights do not change inside: splits are kept, and freed at the end."""
    step = Step(capturing())
    running.append(step)
    try:
        yield
    finally:
        running.remove(step)


def keep_splits(original: Callable[..., Any]) -> Callable[..., Any]:
    """A schedule of megatron.core.pipeline_parallel.schedules: one call of it is one step."""

    @replaces(original)
    def schedule(*args: Any, **kwargs: Any) -> Any:
        with one_step():
            return original(*args, **kwargs)

    return schedule
