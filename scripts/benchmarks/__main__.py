"""Measure, write what was found to a file, and write docs/performance.md from the files: see scripts/bench.

Run inside the environment that scripts/bench made, or in any that has torch, rich and this package.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import page
from benchmarks.pairs import Report

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "bench"

#: What can be measured by itself.
PARTS = ("startup", "construction", "step", "optimizers", "balance", "monitor", "gating", "accuracy")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _machine(gpu: bool) -> dict[str, Any]:
    import torch

    from megatron_fp32_router.version import __version__

    core = sys.modules.get("megatron.core")
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron": None if core is None else core.__version__,
        "plugin": __version__,
        "date": datetime.date.today().isoformat(),
        "load_at_start": round(os.getloadavg()[0], 1),
    }


def _measure(options: argparse.Namespace, progress: Callable[[str], Report]) -> dict[str, Any]:
    """Every part that was asked for, by name."""
    import torch

    quick = options.quick
    found: dict[str, Any] = {}
    if options.gpu:
        from benchmarks import accuracy, gating

        device = torch.device("cuda", torch.cuda.current_device())
        found["gating"] = gating.measure(3 if quick else 20, device, progress("gating"))
        report = progress("accuracy")
        found["accuracy"] = {}
        for name, operands in accuracy.synthetic().items():
            report(name)
            found["accuracy"][name] = accuracy.errors(accuracy.Operands(*(t.to(device) for t in operands)))
        return found

    parts = options.only or PARTS
    # The start of an interpreter is measured before this one grows.
    if "startup" in parts:
        from benchmarks import startup

        found["startup"] = startup.measure(3 if quick else 30, progress("startup"))
    if not set(parts) - {"startup"}:
        return found
    import megatron_fp32_router
    from megatron_fp32_router import lab

    megatron_fp32_router.disable()
    if "optimizers" in parts and options.packages:
        from benchmarks import optimizers

        optimizers.make_importable(options.packages[1:])
    lab.prepare(options.megatron)
    if "construction" in parts:
        from benchmarks import training

        found["construction"] = training.construction(3 if quick else 40, progress("construction"))
    if "step" in parts:
        from benchmarks import training

        pairs = {"small": 5, "medium": 3, "large": 3} if quick else {"small": 150, "medium": 100, "large": 40}
        found["step"] = training.steps(pairs, progress("step"))
    if "optimizers" in parts and options.packages:
        found["optimizers"] = optimizers.measure(3 if quick else 60, options.packages[0], progress("optimizers"))
    elif "optimizers" in parts:
        print("optimizers: not measured, since --packages does not say where they are", file=sys.stderr)
    if "balance" in parts:
        from benchmarks import balance

        found["balance"] = balance.measure(5 if quick else 200, progress("balance"))
    if "monitor" in parts:
        from benchmarks import monitor

        found["monitor"] = monitor.measure(2 if quick else 30, progress("monitor"))
    if "gating" in parts:
        from benchmarks import gating

        found["gating"] = gating.measure(1 if quick else 7, torch.device("cpu"), progress("gating"))
    if "accuracy" in parts:
        from benchmarks import accuracy

        report = progress("accuracy")
        report("training the laboratory's model")
        cases = {**accuracy.synthetic(), "real": accuracy.real()}
        found["accuracy"] = {}
        for name, operands in cases.items():
            report(name)
            found["accuracy"][name] = accuracy.errors(operands)
    return found


def main(arguments: list[str]) -> int:
    """Measure and write. The exit code does not depend on what was measured."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description="What the plugin costs, on against off.")
    parser.add_argument("--megatron", metavar="TREE", help="folder that holds a Megatron as megatron/")
    parser.add_argument(
        "--packages",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="that hold transformer_engine/ (its Python), emerging_optimizers/ and absl/: for the part optimizers",
    )
    parser.add_argument("--gpu", action="store_true", help="measure the GPU of this machine; needs no Megatron")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="few repetitions: to see that it works")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of tables")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where results go (default docs/bench/…)")
    parser.add_argument("--page", action="store_true", help="measure nothing; write docs/performance.md again")
    options = parser.parse_args(arguments)
    if options.quick and options.out is None:
        parser.error("--quick needs --out FILE: what is committed is measured in full")
    if options.page:
        page.write()
        return 0
    import torch

    if options.gpu and not torch.cuda.is_available():
        print("scripts/bench --gpu: no CUDA device here, so nothing was measured", file=sys.stderr)
        return 2
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("starting") as status:

        def progress(part: str) -> Report:
            console.print(f"{datetime.datetime.now():%H:%M:%S} {part}")
            return lambda text: status.update(f"{part}: {text}")

        found = _measure(options, progress)
    kind = "gpu" if options.gpu else "cpu"
    committed = RESULTS / f"{kind}.json"
    target: Path = (options.out or committed).resolve()
    command = " ".join(["scripts/bench", *(["--gpu"] if options.gpu else [])])
    results = {"command": command, "machine": _machine(options.gpu), **found}
    if target == committed and target.exists() and options.only:
        # The other parts stay as they were, and say on which machine they were measured.
        kept = json.loads(target.read_text(encoding="utf-8"))
        if kept["machine"] | {"date": "", "load_at_start": 0} != results["machine"] | {"date": "", "load_at_start": 0}:
            print(f"{target.name} is of another machine or version: measure all parts, or use --out", file=sys.stderr)
            return 2
        results = kept | found
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(_rounded(results), indent=1) + "\n", encoding="utf-8")
    if target == committed:
        page.write()
    print(json.dumps(_rounded(results)) if options.json else page.tables(_rounded(results)))
    return 0


def _rounded(value: Any) -> Any:
    """Four significant digits: more would be noise, and a diff of the file could not be read."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
