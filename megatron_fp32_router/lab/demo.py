"""The demo: the same tiny mixture of experts trained on real text, without the plugin and with it.

Both run side by side, each in a process of its own, from the same seeds. demo_run.py trains in these processes,
demo_report.py makes a table and sentences of the results, demo_page.py and demo_picture.py draw them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import platform
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from megatron_fp32_router.errors import Fp32RouterError
from megatron_fp32_router.lab import demo_page as drawn
from megatron_fp32_router.lab import demo_report as report
from megatron_fp32_router.lab.recipe import LabError, Recipe
from megatron_fp32_router.patching.megatron import read_version
from megatron_fp32_router.terminal import lacking, refuse, repeating, tell
from megatron_fp32_router.version import __version__

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping


STEPS: Final = 45

#: How often each training is repeated with another seed: what differs between seeds is noise.
SEEDS: Final = 3


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
        micro_batch=64,
        micro_batches=4,
        lr=5e-4,
        bias_start=0.75,
        bias_rate=1e-3,
    )


def _choices(recipe: Recipe, steps: int, seeds: int) -> list[list[str]]:
    """What was run, and why, for the output: [what, why]."""
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
            f"About {recipe.tokens_per_step * recipe.topk // recipe.experts:,} tokens per expert; real runs have far "
            "more. bf16 counts exactly up to 256 only.",
        ],
        ["Bytes of Python's own standard library", "Real text, and every machine with Python has it."],
        [
            f"{seeds} seed{'' if seeds == 1 else 's'}, each off and on",
            "Off and on start from the same random numbers; with the plugin the router's weight keeps all their "
            "bits. Several seeds show how much trainings differ by chance alone.",
        ],
        [
            "An update is exact",
            "If the bias is, bit for bit, what one fp32 addition of the rate gives. There is no tolerance.",
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
    parser.add_argument(
        "--megatron",
        metavar="PATH",
        action="append",
        required=True,
        help="the folder that holds megatron/; repeat it to see several side by side",
    )
    parser.add_argument("--steps", default=str(STEPS), metavar="N", help=f"training steps a run (default {STEPS})")
    parser.add_argument("--seeds", default=str(SEEDS), metavar="N", help=f"repetitions of each run (default {SEEDS})")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--out", default="demo", metavar="DIR", help="where the page goes (default ./demo)")
    parser.add_argument("--picture", metavar="PATH", help="also draw README's picture, a PNG")


def main(arguments: argparse.Namespace) -> int:
    """Train, compare, print and write.

    Returns:
        0; 1 if an update was wrong or a tensor below fp32 with the plugin on, or a run broke off; 2 for
        bad input.
    """
    try:
        trees, steps, seeds, out = _checked(arguments)
    except LabError as error:
        return refuse("demo", str(error))
    try:
        data = _collect(trees, steps, seeds)
    except Fp32RouterError as error:
        tell("demo", str(error))
        return 1
    try:
        written = _write(data, out, arguments.picture)
    except OSError as error:
        return refuse("demo", f"cannot write: {error}")
    if arguments.json:
        print(json.dumps(_figures(data)))
    else:
        _print(data, written)
    return 0 if report.protected(data) else 1


def _checked(arguments: argparse.Namespace) -> tuple[dict[str, Path], int, int, Path]:
    """(version -> tree, steps, seeds, folder for the page), or a LabError of one line."""
    trees: dict[str, Path] = {}
    for tree in map(Path, arguments.megatron):
        if not (tree / "megatron" / "core").is_dir():
            raise LabError(f"--megatron {tree}: there is no megatron/core in it")
        version = str(read_version(tree / "megatron" / "core" / "package_info.py") or "of unknown version")
        if version in trees:
            raise LabError(f"--megatron {tree}: {version} was named before, as {trees[version]}")
        trees[version] = tree
    for option in ("steps", "seeds"):
        given = getattr(arguments, option)
        if not given.isdecimal() or int(given) < 1:
            raise LabError(f"--{option} {given}: expected a whole number of at least 1")
    if arguments.picture is not None and importlib.util.find_spec("matplotlib") is None:
        raise LabError(f"--picture {arguments.picture}: {lacking('matplotlib', 'matplotlib')}")
    out = Path(arguments.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"--out {out}: {error.strerror}") from error
    return trees, int(arguments.steps), int(arguments.seeds), out


def _collect(trees: Mapping[str, Path], steps: int, seeds: int) -> dict[str, Any]:
    """All runs and everything that describes them: the data of demo_report.py."""
    recipe = recipe_for_demo()
    numbers = [recipe.seed + i for i in range(seeds)]
    releases = [{"megatron": version, **_run(version, tree, recipe, steps, numbers)} for version, tree in trees.items()]
    return {
        "torch": releases[0]["off"][0]["torch"],
        "python": platform.python_version(),
        "plugin": __version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "steps": steps,
        "seeds": numbers,
        "recipe": recipe.to_json(),
        "choices": _choices(recipe, steps, seeds),
        "releases": releases,
    }


def _run(version: str, tree: Path, recipe: Recipe, steps: int, seeds: list[int]) -> dict[str, Any]:
    """Train off and on at the same time: each process uses one core, and most machines have two."""
    from megatron_fp32_router.lab import run_ranks

    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / name for name in report.RUNS}

        def train(name: str) -> list[dict[str, Any]]:
            results = run_ranks(
                "megatron_fp32_router.lab.demo_run:train",
                recipe,
                {"steps": steps, "seeds": seeds, "progress": str(files[name])},
                megatron=tree,
                plugin=name == "on",
                # A hundred times what a step usually takes: only a training that hangs gets there.
                timeout=300.0 + 30.0 * steps * len(seeds),
            )
            result: list[dict[str, Any]] = results[0]
            return result

        labels = {f"{version}, plugin {name}": file for name, file in files.items()}
        with _shown(labels, steps * len(seeds)), ThreadPoolExecutor(len(files)) as threads:
            return dict(zip(files, threads.map(train, files), strict=True))


@contextlib.contextmanager
def _shown(files: Mapping[str, Path], steps: int) -> Iterator[None]:
    """Show the workers' progress on standard error. Each worker writes one line a step into its file."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[loss]}"), console=Console(stderr=True)) as bars:
        tasks = {label: bars.add_task(label, total=steps, loss="starting") for label in files}

        def look() -> None:
            for label, file in files.items():
                lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
                if lines:
                    bars.update(tasks[label], completed=len(lines), loss=f"loss {lines[-1]}")

        try:
            with repeating(look, seconds=0.25):
                yield
        finally:
            look()


def _figures(data: dict[str, Any]) -> dict[str, Any]:
    """What --json prints: everything but the curves."""

    def without_curves(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in run.items() if key != "series"} for run in runs]

    releases = [
        {"megatron": release["megatron"], **{name: without_curves(release[name]) for name in report.RUNS}}
        for release in data["releases"]
    ]
    return data | {"releases": releases}


def _write(data: dict[str, Any], out: Path, picture: str | None) -> list[Path]:
    """Write the page, the data behind it, and the picture if one is wanted."""
    page = out / "demo.html"
    page.write_text(drawn.render(data), encoding="utf-8")
    page.with_suffix(".json").write_text(json.dumps(data), encoding="utf-8")
    if picture is None:
        return [page]
    from megatron_fp32_router.lab import demo_picture

    demo_picture.draw(data, Path(picture))
    return [page, Path(picture)]


def _print(data: dict[str, Any], written: list[Path]) -> None:
    """Print what happened, then the figures, then what was run."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for state, about, sentence in report.findings(data):
        style = "green" if state == "good" else "red"
        console.print(Text.assemble((about, f"bold {style}"), f": {sentence}"))
    console.print()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in report.header(data):
        shade = {"off": "yellow", "on": "blue"}.get(name.rpartition(" ")[2])
        table.add_column(name, style=shade, overflow="fold")
    for row in report.rows(data):
        table.add_row(*row)
    console.print(table)
    for sentence in report.outcomes(data):
        console.print(f"- {sentence}", highlight=False)
    console.print("\nWhat was run, and why:", highlight=False)
    for what, why in data["choices"]:
        console.print(f"- {what}. {why}", highlight=False)
    seconds = sum(run["cpu_seconds"] for release in data["releases"] for name in report.RUNS for run in release[name])
    console.print(f"\n{seconds:.0f} CPU seconds of training. Written: {', '.join(map(str, written))}", highlight=False)
