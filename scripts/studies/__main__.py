"""Train, simulate, and write docs/study.md from what is in docs/study: see scripts/study."""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import groupby, product
from pathlib import Path

from studies import simulation, training

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "study"


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _train(folder: Path, trees: dict[str, Path], seeds: list[int], steps: int, only: str) -> None:
    """Run every training that has no result yet; one process for each release, off and on."""
    from megatron_fp32_router import lab

    wanted = [run for run in training.runs(trees, seeds) if run.name.startswith(only)]
    known = {run: folder / f"{run.name}.json" for run in wanted}
    for path in known.values():
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if (found["settings"], found["steps"]) != (training.settings_name(), steps):
                raise SystemExit(f"{path}: of other settings or steps. Delete it, or name another folder with --out.")
    missing = [run for run, path in known.items() if not path.exists()]
    _say(f"{len(known) - len(missing)} of {len(known)} trainings are there")
    for (release, plugin), several in groupby(missing, key=lambda run: (run.release, run.plugin)):
        listed = list(several)
        _say(f"{release}, plugin {'on' if plugin else 'off'}: {len(listed)} trainings of {steps} steps")
        lab.run_ranks(
            "studies.training:train",
            lab.Recipe(**training.SETTINGS),
            {"runs": [list(run) for run in listed], "steps": steps, "folder": str(folder.resolve())},
            megatron=trees[release],
            plugin=plugin,
            python_path=[ROOT / "scripts"],
            # Never reached on a machine that works: it may well run behind everything else.
            timeout=60.0 * steps * len(listed),
        )


def _simulate(folder: Path, drawn: int, ranks: tuple[int, ...], only: str) -> None:
    for experts, spread in product(simulation.SHAPES, simulation.SPREADS):
        name = simulation.cell_name(experts, spread)
        path = folder / f"{name}.json"
        if name.startswith(only) and not path.exists():
            result = simulation.simulate(experts, spread, drawn=drawn, ranks=ranks, report=_say)
            training.write(path, result)


def main(arguments: list[str]) -> int:
    """Do what is missing; write the page if the results are the committed ones."""
    parser = argparse.ArgumentParser(prog="scripts/study", description="What the plugin changes in a training.")
    parser.add_argument("--trees", metavar="RELEASE=TREE", nargs="+", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", metavar="NAME", help="results whose name begins so: 0.19.2-on")
    parser.add_argument("--quick", action="store_true", help="two seeds, three steps, few draws: to see that it works")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where results go (default docs/study)")
    parser.add_argument("--page", action="store_true", help="run nothing; write docs/study.md again")
    options = parser.parse_args(arguments)
    if options.quick and options.out is None:
        parser.error("--quick needs --out FOLDER: what is committed is run in full")
    folder: Path = options.out or RESULTS
    seeds, steps, drawn, ranks = list(training.SEEDS), training.STEPS, simulation.DRAWN, simulation.RANKS
    if options.quick:
        seeds, steps, drawn, ranks = seeds[:2], 3, 20_000, ranks[:3]
    trees = {release: Path(tree) for release, _, tree in (given.partition("=") for given in options.trees)}
    if not options.page:
        _train(folder / "training", trees, seeds, steps, options.only)
        _simulate(folder / "simulation", drawn, ranks, options.only)
    if folder == RESULTS:
        from studies import page

        _say(page.write())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
