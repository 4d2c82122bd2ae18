"""`doctor --device`: how exact and fast the router's products are on this GPU, and whether a graph can capture them.

Everything runs with TF32 allowed, as in NVIDIA's containers, so that errors show a product that wrongly uses it.
Without a GPU, split products and TF32 are emulated. Their errors are right; their times mean nothing and are left out.

Shapes: T tokens, H hidden size, E experts.
"""

from __future__ import annotations

import importlib
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch

from megatron_fp32_router.gating import choose, split
from megatron_fp32_router.gating.linear import RouterLinear
from megatron_fp32_router.gating.matmul import mm, tf32
from megatron_fp32_router.settings import PREFIX

Shape = tuple[int, int, int]

#: Variables of torch and of NVIDIA that turn TF32 on or off.
TF32_VARIABLES: Final = ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE")

#: DeepSeek-V3's router, one micro-batch of one sequence; and what a CPU emulates in seconds.
ON_A_GPU: Final[Shape] = (4096, 7168, 256)
ON_A_CPU: Final[Shape] = (1024, 1024, 64)

#: How many times as large as that of plain products the mean error of split ones may be; the same as in the tests.
TOLERANCE: Final = 1.5

#: fp32's mean error is below 1e-7 at all sizes in use, TF32's above 1e-6.
TF32_SHOWS: Final = 5e-7


class Operands(NamedTuple):
    """x: bf16 [T, H], activations; w: fp32 [E, H], weight; g: fp32 [T, E], gradient of the logits."""

    x: torch.Tensor
    w: torch.Tensor
    g: torch.Tensor


Gradients = tuple[torch.Tensor | None, torch.Tensor | None]
#: forward and backward: the logits, and the gradients of input and weight. Both include casts that every call needs.
Way = tuple[Callable[[], torch.Tensor], Callable[[], Gradients]]


def operands(shape: Shape, device: torch.device) -> Operands:
    """Random operands, of the magnitudes that a trained model has."""
    random = torch.Generator().manual_seed(6)
    (tokens, hidden, experts) = shape
    x = torch.randn(tokens, hidden, generator=random).bfloat16()
    w = 0.02 * torch.randn(experts, hidden, generator=random)
    g = 1e-4 * torch.randn(tokens, experts, generator=random)
    return Operands(x.to(device), w.to(device), g.to(device))


@contextmanager
def _tf32_allowed() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _tf32_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.device.type == "cpu":
        return mm(tf32(a), tf32(b))
    with _tf32_allowed():
        return torch.mm(a, b)


def ways(o: Operands) -> dict[str, Way]:
    """The ways to compute a router's products, by name.

    bf16: upstream's with moe_router_dtype unset. TF32: upstream's gradients with TransformerEngine. fp32 and split: the
    plugin's. The weight is split beforehand, since that is done once a step.
    """
    x, w, g = o
    low, parts = w.bfloat16(), split.split_weight(w)

    def in_bf16() -> Gradients:
        grad = g.bfloat16()
        return torch.mm(grad, low), torch.mm(grad.t(), x)

    def plain(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Way:
        return (
            lambda: product(x.float(), w.t()),
            lambda: (product(g, w).bfloat16(), product(g.t(), x.float())),
        )

    return {
        "bf16": (lambda: torch.mm(x, low.t()), in_bf16),
        "TF32": plain(_tf32_product),
        "fp32": plain(mm),
        "split": (
            lambda: split.logits(x, parts, w.shape[0], None),
            lambda: split.gradients(g, x, parts, True, True),
        ),
    }


def milliseconds(action: Callable[[], object]) -> float:
    """Time of one call on CUDA: the device's own, over enough calls to fill its queue."""
    calls = 20
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(calls):
        action()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / calls


def measure(shape: Shape, device: torch.device, turns: int = 7) -> dict[str, Any]:
    """Errors of every way, relative to the sum of the absolute terms of a result; on CUDA times, medians of turns."""
    o = operands(shape, device)
    x, w, g = (t.double() for t in o)
    exact = {"logits": (x, w.t()), "gradient of the weight": (g.t(), x), "gradient of the input": (g, w)}
    references = {name: (a @ b, (a.abs() @ b.abs()).clamp_min(1e-300)) for name, (a, b) in exact.items()}
    del x, w, g
    chosen = chosen_experts(references["logits"][0])
    row: dict[str, Any] = dict(zip(("tokens", "hidden", "experts"), shape, strict=True)) | {"ways": {}}
    reason = choose.unfit(device, torch.bfloat16, o.w, torch.float32)
    row["auto"] = choose.in_words(reason)
    with _tf32_allowed():
        all_ways = ways(o)
        if reason and device.type != "cpu":
            del all_ways["split"]
        for name, (forward, backward) in all_ways.items():
            logits, (grad_input, grad_weight) = forward(), backward()
            results = {"logits": logits, "gradient of the weight": grad_weight, "gradient of the input": grad_input}
            found = {}
            for product, (reference, unit) in references.items():
                result = results[product]
                assert result is not None
                error = (result.double() - reference).abs() / unit
                found[product] = {"max": float(error.max()), "mean": float(error.mean())}
            others = float((chosen_experts(logits) != chosen).any(dim=1).double().mean())
            row["ways"][name] = {"errors": found, "other_experts": others, "forward_ms": None, "backward_ms": None}
        row["splitting_ms"] = None
        if device.type == "cuda":
            times = [
                {
                    name: (milliseconds(forward), milliseconds(backward))
                    for name, (forward, backward) in all_ways.items()
                }
                for _ in range(turns + 1)  # the first one warms up
            ][1:]
            for name, way in row["ways"].items():
                way["forward_ms"] = statistics.median(turn[name][0] for turn in times)
                way["backward_ms"] = statistics.median(turn[name][1] for turn in times)
            row["splitting_ms"] = statistics.median(milliseconds(lambda: split.split_weight(o.w)) for _ in times)
    return row


def chosen_experts(logits: torch.Tensor) -> torch.Tensor:
    """bool [T, E]: the experts with the eight largest logits, as scores that grow with them choose."""
    best = logits.topk(min(8, logits.shape[1]), dim=1).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, best, True)


def sentences_about(row: dict[str, Any], asked: str) -> list[tuple[str, str]]:
    """(level, sentence) on what was measured at one shape. `asked`: what MEGATRON_FP32_ROUTER_PRODUCTS says."""
    found: list[tuple[str, str]] = []
    name = f"{row['tokens']} x {row['hidden']} x {row['experts']}"
    plain, parted = row["ways"]["fp32"], row["ways"].get("split")
    reached = [p for p, error in plain["errors"].items() if "input" not in p and not error["mean"] < TF32_SHOWS]
    if reached:
        found.append(
            ("problem", f"{name}: plain products are not fp32 ({', '.join(reached)}): something turns TF32 on")
        )
    if parted is None:
        return [*found, ("problem" if asked == "split" else "note", f"{name}: products cannot be split: {row['auto']}")]
    factors = {p: e["mean"] / max(plain["errors"][p]["mean"], 1e-300) for p, e in parted["errors"].items()}
    worse = [f"{product} {factor:.3g} times" for product, factor in factors.items() if not factor <= TOLERANCE]
    if worse and not reached:
        found.append(
            (
                "note" if asked == "fp32" else "problem",
                f"{name}: errors of split products are above fp32's ({', '.join(worse)}): set {PREFIX}_PRODUCTS=fp32 "
                "and report this",
            )
        )
    if not found:
        found.append(("ok", f"{name}: split products are as exact as fp32; auto takes {row['auto']}"))
    if parted["forward_ms"] is None:
        return found
    split_ms = parted["forward_ms"] + parted["backward_ms"]
    plain_ms = plain["forward_ms"] + plain["backward_ms"]
    times = (
        f"{split_ms:.3g} ms a micro-batch (and {row['splitting_ms']:.2g} ms a step to split the weight), plain fp32 "
        f"{plain_ms:.3g} ms"
    )
    if split_ms + row["splitting_ms"] > plain_ms:
        advice = "set: keep it" if asked == "fp32" else "as exact, and faster here"
        found.append(("note", f"{name}: split products are SLOWER: {times}. {PREFIX}_PRODUCTS=fp32 is {advice}"))
    elif asked == "fp32":
        found.append(("note", f"{name}: split products are faster: {times}. {PREFIX}_PRODUCTS=fp32 is set: unset it"))
    else:
        found.append(("ok", f"{name}: split products are faster: {times}"))
    return found


def capture(o: Operands) -> str:
    """Why a CUDA graph of a router does not give the bits of eager code with the weight as it is now; "" if it does."""
    x, w = o.x.detach().requires_grad_(), o.w.detach().clone().requires_grad_()

    def step() -> tuple[torch.Tensor, ...]:
        logits: torch.Tensor = RouterLinear.apply(x, w, None, torch.float32)  # type: ignore[no-untyped-call]
        return (logits, *torch.autograd.grad(logits, (x, w), o.g))

    try:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        w.data.mul_(1.5)
        graph.replay()
        torch.cuda.synchronize()
        same = all(torch.equal(a, b) for a, b in zip(out, step(), strict=True))
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "" if same else "a replay gives other bits than eager code"


def _transformer_engine() -> dict[str, Any]:
    """Whether TransformerEngine can be imported here, and where its parts lie."""
    found: dict[str, Any] = {"version": None, "paths": [], "detail": "not installed"}
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "transformer_engine":
            found["detail"] = f"cannot be imported: {error}"
    except Exception as error:  # a library that does not load may raise anything, which is reported
        found["detail"] = f"cannot be imported: {type(error).__name__}: {str(error).splitlines()[0]}"
    else:
        named = ("transformer_engine", "transformer_engine_torch", "transformer_engine.pytorch.router")
        modules = [sys.modules[name] for name in named if name in sys.modules]
        found["paths"] = [str(module.__file__) for module in modules if getattr(module, "__file__", None)]
        found["version"] = getattr(sys.modules["transformer_engine"], "__version__", None)
        fused = "with" if "transformer_engine.pytorch.router" in sys.modules else "without"
        found["detail"] = f"imported, {fused} the fused router"
    return found


def look(add: Callable[[Any, str, str], None], shapes: Sequence[Shape], asked: str) -> dict[str, Any]:
    """Measure this machine.

    Args:
        add: takes (level, about, text) of each finding.
        shapes: (tokens, hidden size, experts) of routers; none: a usual one.
        asked: what MEGATRON_FP32_ROUTER_PRODUCTS says.

    Returns:
        What --json prints of this machine.
    """
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    shapes = shapes or [ON_A_GPU if gpu else ON_A_CPU]
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(device) if gpu else None,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if gpu else None,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "tf32_allowed": torch.get_float32_matmul_precision() != "highest",
        "variables": {name: os.environ[name] for name in TF32_VARIABLES if name in os.environ},
        "products": asked,
        "shapes": [],
        "graph": None,
        "transformer_engine": None,
    }
    if not gpu:
        add("unknown", "device", "there is no GPU here: products are emulated, their times and graphs not measured")
    else:
        add("ok", "device", f"{found['gpu']} (compute capability {found['capability']}, CUDA {found['cuda']})")
    if found["tf32_allowed"]:
        add("note", "TF32", "is allowed in this environment: other fp32 products use it, the router's do not")
    for shape in shapes:
        row = measure(shape, device)
        found["shapes"].append(row)
        for level, text in sentences_about(row, asked):
            add(level, "products", text)
    if gpu:
        found["graph"] = capture(operands(shapes[0], device)) or "captured"
        good = found["graph"] == "captured"
        text = "a router's forward and backward replay with the bits of eager code" if good else found["graph"]
        add("ok" if good else "problem", "CUDA graph", text)
        engine = found["transformer_engine"] = _transformer_engine()
        text = " ".join(filter(None, [engine["detail"], engine["version"], *engine["paths"]]))
        add("ok" if engine["version"] else "note", "TransformerEngine", text)
    return found
