"""Made-up results: of a demo with one layer and two experts, and of a monitored run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fp32_router.lab import demo
from megatron_fp32_router.lab.demo_run import compared
from megatron_fp32_router.monitor import runs

RATE = 1e-3

#: Enough for two steps of one layer and two experts.
COUNTS_SLE = np.array([[[6, 2]], [[4, 4]]])


def fp32_sum(bias: float, step: float) -> float:
    return float(np.float32(bias) + np.float32(step))


def biases_of(*steps: tuple[float, float]) -> np.ndarray[Any, Any]:
    return np.array([[step] for step in steps])


def demo_run(good: bool, seed: int = 1) -> dict[str, Any]:
    right = biases_of(
        (0.75, 0.75), (fp32_sum(0.75, -RATE), fp32_sum(0.75, RATE)), (fp32_sum(0.75, -RATE), fp32_sum(0.75, RATE))
    )
    stuck = biases_of((0.75, 0.75), (0.75, 0.75), (0.75, 0.75))
    judged = compared(right if good else stuck, COUNTS_SLE, RATE)
    judged["series"] |= {
        "layers": ["layer.0.router"],
        "max_vio": [0.5 * seed, 0.0],
        "count_error": [0.0, 0.0 if good else 18.0],
        "loss": [5.0, 2.5 + 0.1 * seed],
    }
    dtype = "float32" if good else "bfloat16"
    return {
        "seed": seed,
        "dtypes": {"weight": [dtype, dtype], "expert_bias": ["bfloat16" if not good else dtype, "float32"]},
        **judged,
        "count_error": 0.0 if good else 18.0,
        "max_vio": 0.25 * seed,
        "disagree": 0.0,
        "tokens_compared": 8,
        "reference_weight": "the <fp32> weight",
        "loss": 2.5 + 0.1 * seed,
        "cpu_seconds": 1.0,
        "torch": "2",
    }


def release_data(on_is_good: bool = True, megatron: str = "0.11.0") -> dict[str, Any]:
    off, on = ([demo_run(good, seed) for seed in (1, 2)] for good in (False, on_is_good))
    return {"megatron": megatron, "off": off, "on": on}


def demo_data(*releases: dict[str, Any]) -> dict[str, Any]:
    return {
        "torch": "2",
        "python": "3",
        "plugin": "0",
        "date": "2026-11-29",
        "steps": 2,
        "seeds": [1, 2],
        "recipe": demo.recipe_for_demo().to_json(),
        "choices": [["what", "why"]],
        "releases": list(releases) or [release_data()],
    }


def look(step: int, layer: int | str, violations: tuple[str, ...] = (), **metrics: float) -> dict[str, Any]:
    numbers = {name.replace("__", "/"): value for name, value in metrics.items()}
    return {"step": step, "layer": layer, "metrics": numbers, "violations": list(violations)}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def a_run(path: Path, layers: int = 12) -> runs.Run:
    records = []
    for step in range(100, 1100, 100):
        for layer in range(1, layers + 1):
            dead = 3.0 if layer == 12 and step >= 400 else 0.0
            records.append(
                look(
                    step,
                    layer,
                    load__max_vio=1 / layer,
                    load__dead_experts=dead,
                    bias__mean=step * 1e-3,
                    bias__spread=0.1,
                    flips__bf16_weight=0.02,
                    flips__actual=0.0,
                    probe__changed=0.1,
                    margin__p10=1e-3,
                )
            )
        records.append(look(step, "all"))
    return runs.read(write(path / "run.jsonl", records))
