"""The demo: the same tiny mixture of experts trained on real text, without the plugin and with it.

Each run is a process of its own, from the same seed. demo_run.py is what happens in it, demo_report.py what
comes out of it, demo_page.py how that looks.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from megatron_fp32_router.errors import Fp32RouterError
from megatron_fp32_router.lab import demo_page as drawn
from megatron_fp32_router.lab import demo_report as report
from megatron_fp32_router.lab.recipe import LabError, Recipe
from megatron_fp32_router.patching.megatron import read_version
from megatron_fp32_router.version import __version__

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator


STEPS: Final = 150


def recipe_for_demo() -> Recipe:
    """Tiny layers and many tokens: what goes wrong grows with tokens per expert, not with the size of the model."""
    return Recipe(
        layers=2,
        hidden=32,
        heads=2,
        moe_ffn=32,
        experts=8,
        topk=2,
        seq_length=64,
        micro_batch=32,
        micro_batches=8,
        lr=5e-4,
        bias_start=0.75,
        bias_rate=1e-3,
    )


def _choices(recipe: Recipe, steps: int) -> list[list[str]]:
    """What the output says about the recipe: [what, why]."""
    return [
        [
            f"{steps} steps of a {recipe.layers}-layer GPT, {recipe.experts} experts, top {recipe.topk}",
            "Small enough for minutes on two CPU cores. Model, schedule, router and optimizer are Megatron's own.",
        ],
        [
            f"Every bias starts at {recipe.bias_start:g}, and moves by {recipe.bias_rate:g}",
            "The state that a long run reaches, here from the first step. The rate is the usual one.",
        ],
        [
            f"{recipe.tokens_per_step:,} tokens a step in {recipe.micro_batches} micro-batches",
            f"About {recipe.tokens_per_step * recipe.topk // recipe.experts:,} tokens per expert. bf16 "
            "counts exactly to 256 only; real runs are far above both.",
        ],
        ["Bytes of Python's own standard library", "Real text that every machine with Python has."],
        [
            f"Seed {recipe.seed}, twice",
            "Both runs start from the same draws; with the plugin the router's weight keeps all its bits.",
        ],
        [
            "The fp64 computation",
            "For the last step: the router's recorded input, times the best weight that exists (with the "
            "plugin the fp32 weight itself, without it the optimizer's fp32 copy of the bf16 weight), "
            "sigmoid, plus bias, top k, all in fp64. A token counts if its set of experts differs.",
        ],
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to a command's parser."""
    parser.add_argument("--megatron", metavar="PATH", required=True, help="the folder that holds megatron/")
    add_shared_arguments(parser)


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that scripts/demo hands on as they are."""
    parser.add_argument("--steps", default=str(STEPS), metavar="N", help=f"training steps a run (default {STEPS})")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--out", default="demo", metavar="DIR", help="where the page goes (default ./demo)")
    parser.add_argument(
        "--picture",
        metavar="PATH",
        help="also draw one expert's bias as a PNG, beside the oldest other release that --out has a run of",
    )


def main(arguments: argparse.Namespace) -> int:
    """Train twice, compare, print and write.

    Returns:
        0; 1 if an update was wrong or a tensor below fp32 with the plugin on, or a run broke off; 2 for
        bad input.
    """
    try:
        tree, version, steps, out = _checked(arguments)
    except LabError as error:
        return _refuse(str(error))
    try:
        data = _collect(tree, version, steps)
    except Fp32RouterError as error:
        return _refuse(str(error), code=1)
    try:
        written = _write(data, out, arguments.picture)
    except OSError as error:
        return _refuse(f"cannot write: {error}")
    if arguments.json:
        print(json.dumps(_figures(data)))
    else:
        _print(data, written)
    return 0 if report.protected(data) else 1


def _refuse(reason: str, code: int = 2) -> int:
    print(f"demo: {reason}", file=sys.stderr)
    return code


def _checked(arguments: argparse.Namespace) -> tuple[Path, str, int, Path]:
    """(tree, Megatron's version, steps, folder for the page), or a LabError of one line."""
    tree = Path(arguments.megatron)
    if not (tree / "megatron" / "core").is_dir():
        raise LabError(f"--megatron {tree}: there is no megatron/core in it")
    if not arguments.steps.isdecimal() or int(arguments.steps) < 1:
        raise LabError(f"--steps {arguments.steps}: expected a whole number of at least 1")
    out = Path(arguments.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"--out {out}: {error.strerror}") from error
    version = read_version(tree / "megatron" / "core" / "package_info.py")
    return tree, str(version or "of unknown version"), int(arguments.steps), out


def _collect(tree: Path, version: str, steps: int) -> dict[str, Any]:
    """Both runs and everything that describes them: the data of demo_report.py."""
    recipe = recipe_for_demo()
    runs = {name: _run(tree, recipe, steps, plugin=name == "on") for name in report.RUNS}
    return {
        "megatron": version,
        "torch": runs["off"]["torch"],
        "python": platform.python_version(),
        "plugin": __version__,
        "steps": steps,
        "recipe": recipe.to_json(),
        "choices": _choices(recipe, steps),
        **runs,
    }


def _run(tree: Path, recipe: Recipe, steps: int, plugin: bool) -> dict[str, Any]:
    from megatron_fp32_router.lab import run_ranks

    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "progress"
        with _shown(progress, steps, f"plugin {'on' if plugin else 'off'}"):
            results = run_ranks(
                "megatron_fp32_router.lab.demo_run:train",
                recipe,
                {"steps": steps, "progress": str(progress)},
                megatron=tree,
                plugin=plugin,
                # One rank has the machine to itself.
                env={"OMP_NUM_THREADS": str(min(4, os.cpu_count() or 1))},
                # Never reached on a machine that works; a hundred times what a step takes there.
                timeout=300.0 + 30.0 * steps,
            )
    result: dict[str, Any] = results[0]
    return result


@contextlib.contextmanager
def _shown(progress: Path, steps: int, what: str) -> Iterator[None]:
    """Show on standard error how far the worker, which writes a line a step into `progress`, has come."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    finished = threading.Event()
    with Progress(*columns, TextColumn("{task.fields[loss]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task(f"{what:<10}", total=steps, loss="starting")

        def look() -> None:
            lines = progress.read_text(encoding="utf-8").splitlines() if progress.exists() else []
            if lines and len(lines[-1].split()) == 2:
                step, loss = lines[-1].split()
                bar.update(task, completed=int(step), loss=f"loss {loss}")

        def watch() -> None:
            while not finished.wait(0.25):
                look()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            finished.set()
            watcher.join()
            look()


def _figures(data: dict[str, Any]) -> dict[str, Any]:
    """What --json prints: everything but the curves."""
    return {
        key: {name: value for name, value in entry.items() if name != "series"} if key in report.RUNS else entry
        for key, entry in data.items()
    }


def _write(data: dict[str, Any], out: Path, picture: str | None) -> list[Path]:
    """Write the page, the data behind it, and the picture if one is wanted."""
    name = data["megatron"].replace(" ", "-")
    page, kept = out / f"demo-{name}.html", out / f"demo-{name}.json"
    page.write_text(drawn.render(data), encoding="utf-8")
    kept.write_text(json.dumps(data), encoding="utf-8")
    written = [page]
    if picture is not None:
        others = [json.loads(path.read_text(encoding="utf-8")) for path in out.glob("demo-*.json") if path != kept]
        others.sort(key=lambda other: [int(part) for part in re.findall(r"\d+", other["megatron"])])
        drawn.picture([*others[:1], data], Path(picture))
        written.append(Path(picture))
    return written


def _print(data: dict[str, Any], written: list[Path]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"Megatron-Core {data['megatron']}, {data['steps']} steps, off beside on", title_justify="left")
    table.add_column("")
    table.add_column("plugin off", style="red")
    table.add_column("plugin on", style="green")
    for row in report.rows(data):
        table.add_row(*row)
    console.print(table)
    for sentence in report.findings(data):
        console.print(f"- {sentence}", highlight=False)
    console.print("\nWhat was run, and why:", highlight=False)
    for what, why in data["choices"]:
        console.print(f"- {what}. {why}", highlight=False)
    seconds = sum(data[name]["seconds"] for name in report.RUNS)
    console.print(f"\n{seconds:.0f} s of training. Written: {', '.join(map(str, written))}", highlight=False)
