"""What the monitor says of what it has found. Imported only where there is something."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch

from megatron_fp32_router.errors import UnprotectedRouterError
from megatron_fp32_router.log import say
from megatron_fp32_router.monitor.sinks import Layer
from megatron_fp32_router.patching.registry import mismatch, registry
from megatron_fp32_router.settings import PREFIX


def say_what_is_not_finite(step: int, found: Mapping[tuple[Layer, str], float]) -> None:
    """Warn. `found`: (layer, tensor) -> how many of its values are NaN or infinite."""
    listed = _listed([f"layer {layer}, {name}: {value:.0f}" for (layer, name), value in found.items()])
    say(
        logging.WARNING,
        f"the monitor found values that are not finite, since step {step}: {listed}; nothing is stopped",
        threshold=registry.settings.log,
    )


def refuse(found: list[str]) -> None:
    """Raise, or warn: broken promises.

    Raises:
        UnprotectedRouterError: under on_mismatch="raise".
    """
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
