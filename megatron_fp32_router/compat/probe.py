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

from megatron_fp32_router.compat import accepted
from megatron_fp32_router.compat.judge import Target
from megatron_fp32_router.errors import Fp32RouterError
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


def run(root: Path, targets: Sequence[Target], version: str, *, plugin: bool = True) -> list[Proof]:
    """Train on the Megatron in `root` and compare.

    Args:
        plugin: False runs the same without the plugin, which must fail: for the tests of the probe.

    Returns:
        One Proof a promise. Where the training itself broke off, one that says so.

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

    with tempfile.TemporaryDirectory() as folder:
        allowed, progress = Path(folder) / "accepted.json", Path(folder) / "progress"
        accepted.write(allowed, version, targets, {})
        with _Shown(progress):
            try:
                (found,) = run_ranks(
                    "megatron_fp32_router.compat.probe_run:prove",
                    RECIPE,
                    {"progress": str(progress)},
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
                return [Proof("training", False, str(error).strip().splitlines()[-1])]
    return [Proof(name, bool(holds), str(detail)) for name, holds, detail in found]


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
