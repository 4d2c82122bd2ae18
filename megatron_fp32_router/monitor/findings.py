"""Messages about what the monitor found. Imported only when there is something to say."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from megatron_fp32_router.errors import UnprotectedRouterError
from megatron_fp32_router.log import rank, say
from megatron_fp32_router.monitor.sinks import NOT_FINITE, Entries, Layer
from megatron_fp32_router.patching.registry import mismatch
from megatron_fp32_router.settings import PREFIX


def failure(error: Exception, tell_others: Callable[[str], bool]) -> tuple[str, int]:
    """Tell the other ranks that the monitor failed on this one.

    Args:
        error: what the monitor failed with.
        tell_others: stores why the monitor ends; returns whether other ranks can read it. It may fail too.

    Returns:
        Why the monitor ends, and which rank has to say so: rank 0, or this one where the others could not be told.
    """
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}, line {place.lineno}"
    why = f"on rank {rank()} it failed with {type(error).__name__}: {' '.join(str(error).split())} ({where})"
    try:
        told = tell_others(why)
    except Exception as another:  # the store itself has failed
        told, why = False, f"{why}, and could not tell the other ranks ({type(another).__name__}: {another})"
    return why, 0 if told else rank()


def say_the_end(why: str, speaker: int) -> None:
    """Warn that the monitor has ended, on rank `speaker`."""
    what = f"the monitor has ended, and the training goes on without it: {why}"
    say(logging.WARNING, what, speaker=speaker)


def say_that_no_token_was_seen() -> None:
    """Warn that the hooks were on, and did not run."""
    say(
        logging.WARNING,
        "the monitor saw no tokens: inside CUDA graphs and torch.compile forward hooks do not run, so it computes no "
        "routing stability, and no load for models without expert biases",
        once=True,
    )


def say_what_is_not_finite(step: int, entries: Entries, new: set[tuple[Layer, str]]) -> None:
    """Warn, in one line. Whether a training may go on with it is upstream's decision.

    Args:
        step: the step of the look.
        entries: what it found in all layers.
        new: (layer, metric) of the tensors that were finite at the look before.
    """
    listed = _listed(
        [
            f"layer {layer}, {name.removeprefix(NOT_FINITE)}: {value:.0f}"
            for layer, entry in entries.items()
            for name, value in entry["metrics"].items()
            if (layer, name) in new
        ]
    )
    say(
        logging.WARNING,
        f"the monitor found values that are not finite, since step {step}: {listed}; nothing is stopped",
    )


def refuse(entries: Entries) -> None:
    """Raise, or warn, because `entries` hold violations.

    Raises:
        UnprotectedRouterError: under on_mismatch="raise".
    """
    found = [f"layer {layer}, {text}" for layer, entry in entries.items() for text in entry["violations"]]
    mismatch(
        UnprotectedRouterError,
        f"the monitor found routers that are no longer in fp32: {_listed(found)}. Something has changed them since the "
        f"model was wrapped. {PREFIX}_ON_MISMATCH=warn trains on as it is.",
    )


def violations(
    router: str,
    now: Mapping[str, torch.dtype],
    below: Iterable[str],
    bits: float | None,
    last: Mapping[str, torch.dtype],
    steps: int,
) -> list[str]:
    """Sentences, one for each broken promise.

    Args:
        router: its module name, for the sentences.
        now: dtypes of its tensors and results.
        below: the names of those that are below fp32.
        bits: significant bits of the gating's arithmetic, where these are too few.
        last: the dtypes at the look before.
        steps: how long ago that was.
    """
    found = []
    ago = f"{steps} step{'' if steps == 1 else 's'}"
    for name in below:
        was = last.get(name)
        since = f"; it was {_short(was)} {ago} before" if was not in (None, now[name]) else ""
        found.append(f"{router}: {name} is {_short(now[name])}{since}")
    if bits is not None:
        kind = "bf16" if bits < 9.5 else "TF32 or fp16"
        found.append(f"{router}: logits are computed with {bits:.0f} significant bits, as {kind} does; fp32 has 24")
    return found


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(found: list[str]) -> str:
    return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
