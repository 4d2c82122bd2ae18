"""What a look of the monitor costs: python scripts/benchmarks/monitor.py TREE [--experts E --hidden H --layers L]

TREE holds megatron/. Trains the laboratory's model with a look every 5 steps and compares steps that are looked at with
those that are not. On a machine without a GPU the shares hold for that machine only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time

INTERVAL = 5


def main() -> None:
    """Train, measure, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    wanted = parser.parse_args()
    folder = tempfile.TemporaryDirectory()
    os.environ["MEGATRON_FP32_ROUTER_MONITOR"] = str(INTERVAL)
    os.environ["MEGATRON_FP32_ROUTER_MONITOR_DIR"] = folder.name

    from megatron_fp32_router import lab

    lab.prepare(wanted.tree)
    recipe = lab.Recipe(
        experts=wanted.experts,
        hidden=wanted.hidden,
        layers=wanted.layers,
        topk=8,
        seq_length=256,
        micro_batches=4,
    )
    looked_at, others = [], []
    with lab.parallel(recipe):
        room = lab.build(recipe)
        batches = lab.text_batches(recipe, seed=1)
        for step in range(1, wanted.steps + 1):
            start = time.perf_counter()
            room.step(batches)
            if step > INTERVAL:  # the first steps and the first look warm things up
                (others if step % INTERVAL else looked_at).append(time.perf_counter() - start)
    ordinary, look = statistics.median(others), statistics.median(looked_at)
    result = {
        "megatron": lab.megatron_version(),
        "step_ms": 1e3 * ordinary,
        "step_with_a_look_ms": 1e3 * look,
        "look_ms": 1e3 * (look - ordinary),
        "share_at_N_100": (look - ordinary) / ordinary / 100,
        "recipe": recipe.to_json(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
