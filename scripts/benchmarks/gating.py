"""The time of the router's GEMMs, forward and backward, in each arithmetic, at the shapes of published models.

On a CPU: bf16 as upstream computes it and fp32 as the plugin does (split products are emulated there, so their time
means nothing; TF32 does not exist). On CUDA: these, TF32, and split products.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks.pairs import Report, clock
from megatron_fp32_router.compat.device import Operands, Way, milliseconds, operands, ways
from megatron_fp32_router.gating import split

#: tokens, hidden size, experts.
SHAPES = {
    "DeepSeek-V3": (4096, 7168, 256),
    "Qwen3-30B-A3B": (4096, 2048, 128),
    "Mixtral-8x7B": (4096, 4096, 8),
}

#: Dense peaks that vendors publish: bytes/s, and FLOP/s of bf16, TF32, and fp32 without tensor cores.
PEAKS = {
    "A100": (2.04e12, 312e12, 156e12, 19.5e12),
    "H100": (3.35e12, 989e12, 495e12, 67e12),
    "H200": (4.8e12, 989e12, 495e12, 67e12),
}


def _ways(o: Operands) -> dict[str, Way]:
    """way -> forward, backward."""
    found = ways(o)
    if o.x.device.type == "cpu":
        return {name: found[name] for name in ("bf16", "fp32")}
    return {**found, "splitting the weight, once a step": (lambda: split.split_weight(o.w), lambda: (None, None))}


def _peak_of_cpu() -> dict[str, float]:
    """FLOP/s that a large square product reaches here and now, by dtype: what "of the best" is measured against."""
    best = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a = torch.randn(1536, 1536).to(dtype)
        best[name] = 2 * 1536**3 / min(clock(lambda a=a: torch.mm(a, a)) for _ in range(5)) * 1e3
    return best


def bound_ms(way: str, tokens: int, hidden: int, experts: int, peaks: tuple[float, ...]) -> float:
    """Least time of the forward on a device with these PEAKS.

    The product takes the longer of moving and multiplying, everything being moved once; a cast of the activations
    to fp32 is a kernel of its own and comes before.
    """
    bandwidth, bf16, tf32, fp32 = peaks
    cast = way in ("TF32", "fp32")
    weight, logits = {"bf16": 2, "split": 6}.get(way, 4), 2 if way == "bf16" else 4
    moved = tokens * hidden * (4 if cast else 2) + experts * hidden * weight + tokens * experts * logits
    rate = {"bf16": bf16, "split": bf16 / 3, "TF32": tf32, "fp32": fp32}[way]
    seconds = max(moved / bandwidth, 2.0 * tokens * hidden * experts / rate)
    return 1e3 * (seconds + (tokens * hidden * 6 / bandwidth if cast else 0.0))


def measure(repeats: int, device: torch.device, report: Report) -> dict[str, Any]:
    """Medians in milliseconds, by shape and way, taken in turn."""
    peaks, take = None, clock if device.type == "cpu" else milliseconds
    if device.type == "cpu":
        report("the best this CPU does")
        best = _peak_of_cpu()
    else:
        name = torch.cuda.get_device_name(device)
        peaks = next((peak for key, peak in PEAKS.items() if key in name), None)
    rows = []
    for model, (tokens, hidden, experts) in SHAPES.items():
        timed = _ways(operands((tokens, hidden, experts), device))
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in timed}
        for turn in range(repeats + 1):
            report(f"{model}: turn {turn + 1} of {repeats + 1}")
            for way, (forward, backward) in timed.items():
                taken = take(forward), take(backward)
                if turn:  # the first one warms up
                    times[way].append(taken)
        row: dict[str, Any] = {"model": model, "tokens": tokens, "hidden": hidden, "experts": experts, "ways": {}}
        for way, taken_ms in times.items():
            forward_ms = statistics.median(f for f, _ in taken_ms)
            backward_ms = statistics.median(b for _, b in taken_ms)
            found = {"forward_ms": forward_ms, "backward_ms": backward_ms, "of_bound": None}
            if device.type == "cpu":
                found["of_bound"] = 2e3 * tokens * hidden * experts / best[way] / forward_ms
            elif peaks is not None and "splitting" not in way:
                found["of_bound"] = bound_ms(way, tokens, hidden, experts, peaks) / forward_ms
            row["ways"][way] = found
        rows.append(row)
    return {"device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device), "rows": rows}
