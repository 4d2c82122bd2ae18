"""The behavioural part of `check`: the laboratory trains on the tree, and what the plugin promises is compared.

The training is a process of its own (probe_run.py), in which what has drifted counts as accepted, so that the plugin is
applied to it; everything else stops it as it would stop a real one.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_fp32_router.errors import Fp32RouterError
from megatron_fp32_router.patching import accepted
from megatron_fp32_router.patching.judge import Target
from megatron_fp32_router.settings import PREFIX


@dataclass(frozen=True)
class Proof:
    """One thing that the probe tried.

    Attributes:
        name: what.
        holds: whether it is as the plugin promises.
        detail: the figures, or what is wrong.
    """

    name: str
    holds: bool
    detail: str


@dataclass(frozen=True)
class Outcome:
    """What came of a probe.

    Attributes:
        proofs: one for each promise; where the training itself broke off, one that says so.
        unproven: names of the drifted targets that did not run in it, so that nothing is known about them.
    """

    proofs: list[Proof]
    unproven: frozenset[str]

    @property
    def passed(self) -> bool:
        """Whether every promise holds."""
        return all(proof.holds for proof in self.proofs)


def run(root: Path, targets: Sequence[Target], version: str, *, plugin: bool = True) -> Outcome:
    """Train on the Megatron in `root` and compare.

    Args:
        plugin: False runs the same without the plugin, which must fail: for the tests of the probe.

    Raises:
        Fp32RouterError: this machine lacks what the laboratory needs.
    """
    for name in ("torch", "numpy"):
        if importlib.util.find_spec(name) is None:
            raise Fp32RouterError(
                f"--probe trains a tiny model, and {name} is not installed: "
                f"{sys.executable} -m pip install 'megatron-fp32-router[lab]'"
            )
    from megatron_fp32_router.compat.probe_run import RECIPE
    from megatron_fp32_router.lab import RankFailedError, RanksTimedOutError, run_ranks

    drifted = [target for target in targets if target.state == "drifted"]
    files = {str(root.resolve() / target.file) for target in drifted}
    with tempfile.TemporaryDirectory() as folder:
        allowed, progress = Path(folder) / "accepted.json", Path(folder) / "progress"
        accepted.write(allowed, version, targets, {})
        with _Shown(progress):
            try:
                (result,) = run_ranks(
                    "megatron_fp32_router.compat.probe_run:prove",
                    RECIPE,
                    {"progress": str(progress), "files": sorted(files)},
                    megatron=root,
                    plugin=plugin,
                    env={
                        f"{PREFIX}_ACCEPTED": str(allowed),
                        f"{PREFIX}_ON_MISMATCH": "raise",
                        f"{PREFIX}_PROTECT": "all",
                    },
                    timeout=300.0,
                )
            except (RankFailedError, RanksTimedOutError) as error:
                # The last line of a traceback is what went wrong; the rest is where.
                broken = Proof("training", False, str(error).strip().splitlines()[-1])
                return Outcome([broken], frozenset(target.name for target in drifted))
    proofs = [Proof(name, bool(holds), str(detail)) for name, holds, detail in result["proofs"]]
    unproven = [target.name for target in drifted if not _ran(target, result["ran"][str(root.resolve() / target.file)])]
    return Outcome(proofs, frozenset(unproven))


def _ran(target: Target, functions: list[tuple[str, int]]) -> bool:
    """Whether a drifted target was run: called, or, for what is no function, imported."""
    last = target.name.rpartition(":")[2].rpartition(".")[2]
    first_line, last_line = target.span
    if target.span == (0, 0):
        return True
    return any(name == last and first_line <= line <= last_line for name, line in functions)


class _Shown:
    """Says on standard error what the probe is at: it takes many seconds."""

    def __init__(self, progress: Path) -> None:
        self._progress = progress
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        print("probe: starting Megatron …", file=sys.stderr, flush=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._finished.set()
        self._thread.join()

    def _watch(self) -> None:
        shown = 0
        while not self._finished.wait(0.2):
            stages = self._progress.read_text(encoding="utf-8").splitlines() if self._progress.exists() else []
            for stage in stages[shown:]:
                print(f"probe: {stage} …", file=sys.stderr, flush=True)
            shown = len(stages)
