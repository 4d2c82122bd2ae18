"""The behavioural part of `check`: the laboratory trains on the tree, and tries whether the plugin's promises hold.

The trainings run in processes of their own. There, drifted functions count as accepted, so that the plugin is applied
to them; anything else stops such a training as it would stop a real one. One rank tries the router (probe_run.py), two
ranks try optimizers, checkpoints and schedules (probe_areas.py), and only the areas that were asked for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from megatron_fp32_router.errors import Fp32RouterError
from megatron_fp32_router.patching import accepted
from megatron_fp32_router.patching.judge import Target
from megatron_fp32_router.patching.record import USUAL
from megatron_fp32_router.settings import PREFIX
from megatron_fp32_router.terminal import lacking, repeating, tell

#: Areas of which nothing is tried, and why.
_NOT_TRIED: Final = {
    "fsdp": "the probe trains with Megatron's DistributedDataParallel only; read the diff",
    "monitor": "the probe does not turn the monitor on; read the diff",
}


@dataclass(frozen=True)
class Proof:
    """One thing that the probe tried.

    Attributes:
        name: what was tried.
        holds: whether it is as the plugin promises; None: nothing was tried.
        detail: the figures, what is wrong, or why nothing was tried.
    """

    name: str
    holds: bool | None
    detail: str


@dataclass(frozen=True)
class Outcome:
    """The result of a probe.

    Attributes:
        proofs: one for each promise; where a training itself broke off, one that says so.
        unproven: names of the drifted targets that did not run in it, so that nothing is known about them.
        seconds: how long it took.
    """

    proofs: list[Proof]
    unproven: frozenset[str]
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether every promise holds that was tried."""
        return all(proof.holds is not False for proof in self.proofs)


def run(
    root: Path,
    targets: Sequence[Target],
    version: str,
    areas: Sequence[str] = USUAL,
    *,
    plugin: bool = True,
    transformer_engine: str = "",
) -> Outcome:
    """Train on the Megatron in `root` and compare.

    Args:
        areas: what to try, of patching.record.AREAS.
        plugin: False runs the same without the plugin, which must fail: for the tests of the probe.
        transformer_engine: a folder with TransformerEngine's Python, for the precision-aware optimizer.

    Raises:
        Fp32RouterError: this machine lacks what the laboratory needs.
    """
    for name in ("torch", "numpy"):
        if importlib.util.find_spec(name) is None:
            needed = ("torch", "numpy", "psutil", "pyyaml", "rich")  # the `lab` extra
            raise Fp32RouterError(f"--probe trains a tiny model, and {lacking(name, *needed)}")
    from megatron_fp32_router.compat import probe_areas, probe_run
    from megatron_fp32_router.lab import RankFailedError, RanksTimedOutError, run_ranks

    drifted = [target for target in targets if target.state == "drifted"]
    files = {str(root.resolve() / target.file) for target in drifted}
    start = time.monotonic()
    proofs = [Proof(area, None, why) for area, why in _NOT_TRIED.items() if area in areas]
    not_tried = len(proofs)
    ran: dict[str, list[tuple[str, int]]] = {file: [] for file in files}
    with tempfile.TemporaryDirectory() as folder:
        allowed, progress, done = (Path(folder) / name for name in ("accepted.json", "progress", "done"))
        accepted.write(allowed, version, targets, {})
        arguments: dict[str, Any] = {
            "progress": str(progress),
            "done": str(done),
            "files": sorted(files),
            "areas": list(areas),
            "transformer_engine": transformer_engine,
        }
        env = {f"{PREFIX}_ACCEPTED": str(allowed), f"{PREFIX}_ON_MISMATCH": "raise", f"{PREFIX}_PROTECT": "all"}
        with _shown(progress):
            for module, its_areas in ((probe_run, probe_run.PROMISES.keys()), (probe_areas, probe_areas.AREAS)):
                if not its_areas & set(areas):
                    continue
                target = f"{module.__name__}:prove"
                try:
                    results = run_ranks(
                        target, module.RECIPE, arguments, megatron=root, plugin=plugin, env=env, timeout=300.0
                    )
                except (RankFailedError, RanksTimedOutError) as error:
                    proofs = proofs[:not_tried] + [Proof(*json.loads(line)) for line in _lines(done)]
                    # The last line of a traceback is what went wrong; the rest is where.
                    last = _lines(progress)[-1:] or ["training"]
                    proofs.append(Proof(last[0], False, str(error).strip().splitlines()[-1]))
                    break
                proofs += [_worst(found) for found in zip(*(result["proofs"] for result in results), strict=True)]
                for file in files:
                    ran[file] += [function for result in results for function in result["ran"][file]]
    unproven = [
        target.name
        for target in drifted
        if not target.areas & set(areas) or not _ran(target, ran[str(root.resolve() / target.file)])
    ]
    return Outcome(proofs, frozenset(unproven), time.monotonic() - start)


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def _worst(found: Sequence[Sequence[Any]]) -> Proof:
    """The result of one promise over all ranks: wrong if any of them found it wrong."""
    name, holds, detail = next((proof for proof in found if proof[1] is False), found[0])
    return Proof(str(name), holds, str(detail))


def _ran(target: Target, functions: list[tuple[str, int]]) -> bool:
    """Whether a drifted target was called; what is no function counts as run."""
    last = target.name.rpartition(":")[2].rpartition(".")[2]
    first_line, last_line = target.span
    if target.span == (0, 0):
        return True
    return any(name == last and first_line <= line <= last_line for name, line in functions)


@contextlib.contextmanager
def _shown(progress: Path) -> Iterator[None]:
    """Print on standard error what the probe is doing: it takes many seconds."""
    shown, start = 0, time.monotonic()

    def look() -> None:
        nonlocal shown
        stages = _lines(progress)
        for stage in stages[shown:]:
            tell("check", f"probe, {time.monotonic() - start:.0f} s: {stage} …")
        shown = len(stages)

    tell("check", "the probe is starting Megatron; it takes a minute or two …")
    with repeating(look, seconds=0.2):
        yield
    look()
