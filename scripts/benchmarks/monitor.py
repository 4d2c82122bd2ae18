"""What the monitor costs: nothing while it is off, nothing between looks, and a look."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from benchmarks.balance import Counting
from benchmarks.pairs import Report, clock, compare
from benchmarks.training import SIZES

MONITOR, FOLDER = "MEGATRON_FP32_ROUTER_MONITOR", "MEGATRON_FP32_ROUTER_MONITOR_DIR"
SIZE = "medium"


def measure(pairs: int, report: Report) -> dict[str, Any]:
    """Train the medium model with a look every other step, and compare those steps with the ones between them."""
    import megatron_fp32_router
    from megatron_fp32_router import lab

    recipe = lab.Recipe(**SIZES[SIZE])
    operations = {}
    with tempfile.TemporaryDirectory() as folder, lab.parallel(recipe):
        batches = lab.text_batches(recipe, seed=1)
        batch = [next(batches) for _ in range(recipe.micro_batches)]
        # At N=100 the second step after turning it on is one between looks, at N=2 it is a look.
        for name, interval in (("off", None), ("between looks", "100"), ("a look", "2")):
            megatron_fp32_router.disable()
            os.environ.pop(MONITOR, None)
            if interval is not None:
                os.environ |= {MONITOR: interval, FOLDER: folder}
            megatron_fp32_router.enable()
            room = lab.build(recipe)
            room.step(batch)
            with Counting() as counting:
                room.step(batch)
            operations[name] = counting.operations
        done = iter(range(1, 10**6))

        def step() -> float:
            report(f"step {next(done)} of {2 * (pairs + 2)}")
            return clock(lambda: room.step(batch))

        # The look comes with every second step, whatever is called: the order inside a pair stays as it is.
        found = compare(step, step, pairs, shuffle=False)
        megatron_fp32_router.disable()
        for name in (MONITOR, FOLDER):
            os.environ.pop(name, None)
    return {"size": SIZE, "recipe": SIZES[SIZE], "operations": operations, **found}
