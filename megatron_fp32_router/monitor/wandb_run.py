"""The W&B run of a program without megatron.training. Imported only where wandb is."""

from __future__ import annotations

import sys

from megatron_fp32_router.monitor.sinks import Entries, aggregate


def log(step: int, entries: Entries) -> None:
    """Hand a look to the run that the program has started in this process; none is started here.

    The program counts the steps of its run as it likes, so the look's own step is a metric of its own, and the values
    go with the program's next log().
    """
    run = getattr(sys.modules["wandb"], "run", None)
    if run is None:
        return
    run.define_metric("moe_router/*", step_metric="moe_router/step")
    values = {f"moe_router/all/{name}": value for name, value in aggregate(entries).items()}
    violations = sum(len(entry["violations"]) for entry in entries.values())
    run.log({**values, "moe_router/violations": violations, "moe_router/step": step}, commit=False)
