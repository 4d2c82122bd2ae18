"""Building the laboratory's model and training it one step, with the plugin on against off."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.pairs import Report, clock, compare

#: Sizes of the laboratory's model, up to what a CPU trains in minutes.
SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden": 64, "layers": 2, "experts": 8, "topk": 2},
    "medium": {"hidden": 256, "layers": 4, "experts": 32, "topk": 4, "moe_ffn": 128, "seq_length": 256},
    "large": {"hidden": 512, "layers": 4, "experts": 64, "topk": 8, "moe_ffn": 256, "seq_length": 256},
}


def turn(on: bool) -> None:
    """The plugin on or off, in this process."""
    import megatron_fp32_router

    (megatron_fp32_router.enable if on else megatron_fp32_router.disable)()


def steps(pairs: dict[str, int], report: Report) -> list[dict[str, Any]]:
    """Time a training step of two models that live side by side, one of which was built under the plugin."""
    from megatron_fp32_router import lab

    rows = []
    for name, fields in SIZES.items():
        recipe = lab.Recipe(**fields)
        with lab.parallel(recipe):
            off, on = pair_of_steps(recipe, lambda text, name=name: report(f"{name}: {text}"), 2 * (pairs[name] + 2))
            found = compare(off, on, pairs[name])
            tokens = recipe.seq_length * recipe.micro_batch * recipe.micro_batches
            rows.append({"size": name, "recipe": fields, "tokens": tokens, **found})
            del off, on
        turn(False)
    return rows


def pair_of_steps(recipe: Any, report: Report, of: int) -> tuple[Callable[[], float], Callable[[], float]]:
    """Build two models, one of them under the plugin; a step of each, off and on, that returns its milliseconds."""
    from megatron_fp32_router import lab

    rooms = {}
    for on in (False, True):
        turn(on)
        rooms[on] = lab.build(recipe)
    batches = lab.text_batches(recipe, seed=1)
    batch = [next(batches) for _ in range(recipe.micro_batches)]
    done = iter(range(1, 10**6))

    def step(on: bool) -> float:
        report(f"step {next(done)} of {of}")
        turn(on)
        return clock(lambda: rooms[on].step(batch))

    return (lambda: step(False)), (lambda: step(True))


def construction(pairs: int, report: Report) -> dict[str, Any]:
    """Time building, wrapping and equipping the medium model; its peak memory comes from a process of its own each."""
    from megatron_fp32_router import lab

    recipe = lab.Recipe(**SIZES["medium"])
    done = iter(range(1, 10**6))

    def build(on: bool) -> float:
        report(f"model {next(done)} of {2 * (pairs + 2)}")
        turn(on)
        with lab.parallel(recipe):
            room: Any = None

            def make() -> None:
                nonlocal room
                room = lab.build(recipe)

            taken = clock(make)
            del room
        gc.collect()
        return taken

    found = compare(lambda: build(False), lambda: build(True), pairs)
    turn(False)
    report("peak memory, in two processes")
    memory = {way: _peak_of_a_process(way == "on") for way in ("off", "on")}
    return {"size": "medium", **found, "off_peak_mib": memory["off"], "on_peak_mib": memory["on"]}


def _peak_of_a_process(on: bool) -> float | None:
    environment = {**os.environ, "MEGATRON_FP32_ROUTER": "1" if on else "0"}
    tree = Path(sys.modules["megatron.core"].__file__ or "").parents[2]
    command = [sys.executable, "-m", "benchmarks.training", str(tree)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    peak: float | None = json.loads(done.stdout.splitlines()[-1])
    return peak


def _resident(name: str) -> int | None:
    """KiB that /proc says, VmRSS or VmHWM (the peak); None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), None)


def _peak_of_building() -> float | None:
    """MiB that building the medium model adds at its peak."""
    from megatron_fp32_router import lab

    small, medium = lab.Recipe(), lab.Recipe(**SIZES["medium"])
    with lab.parallel(small):
        lab.build(small)  # what is imported on first use
    gc.collect()
    before = _resident("VmRSS")
    with lab.parallel(medium):
        room = lab.build(medium)
        peak = _resident("VmHWM")
        del room
    return None if before is None or peak is None else round((peak - before) / 1024, 1)


if __name__ == "__main__":
    from megatron_fp32_router import lab

    lab.prepare(sys.argv[1])
    print(json.dumps(_peak_of_building()))
