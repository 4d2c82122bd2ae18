"""Several ranks: a process each, which meet through a file. The caller gets the traceback of a rank that fails."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from megatron_fp32_router.lab.recipe import LabError, Recipe
from megatron_fp32_router.settings import PREFIX

#: Seconds that the others get to end, or to say what they saw, once one rank has failed.
_GRACE: Final = 2.0
_LOG_LINES: Final = 40

#: Gloo sometimes fails with this where many ranks of several launches start at once.
_UNMET: Final = "Gloo connectFullMesh failed"


class RankFailedError(LabError):
    """A rank raised, or died. The message ends with that rank's own traceback.

    Attributes:
        rank: the one that failed first.
        kind: full name of the exception's class, or "" when the process died without one.
        tracebacks: rank -> traceback, of every rank that raised.
    """

    def __init__(self, message: str, rank: int, kind: str, tracebacks: Mapping[int, str]) -> None:
        super().__init__(message)
        self.rank, self.kind, self.tracebacks = rank, kind, dict(tracebacks)


class RanksTimedOutError(LabError):
    """The ranks were not done in time; all have been killed. The message shows where each of them was."""


def run_ranks(
    target: str,
    recipe: Recipe,
    arguments: Mapping[str, Any] | None = None,
    *,
    megatron: str | Path | None = None,
    plugin: bool | Sequence[bool],
    env: Mapping[str, str] | None = None,
    timeout: float = 300.0,
    python_path: Sequence[str | Path] = (),
    logs: Path | None = None,
) -> list[Any]:
    """Call `target` in `recipe.world_size` new processes, each inside `lab.parallel(recipe)`.

    Args:
        target: "module:function"; called as `function(recipe, arguments)`.
        recipe: what to build and how to lay it out.
        arguments: plain values and tensors (what torch.load(weights_only=True) takes).
        megatron: the directory that holds `megatron/`; None: whatever the processes can import.
        plugin: whether MEGATRON_FP32_ROUTER is 1 or 0 there; a sequence has one answer for each rank.
        env: further environment variables; they win over everything set here.
        timeout: seconds for the whole run, and for each collective in it.
        python_path: directories put in front of PYTHONPATH.
        logs: an existing directory that keeps what each rank printed, as `rank-0.log` and so on.

    Returns:
        What the function returned, in order of rank (plain values and tensors, which come back on the CPU).

    Raises:
        RankFailedError: a rank failed. (Where ranks could not connect to each other before `target` was called, they
            are first started once more, and standard error says so.)
        RanksTimedOutError: not done in `timeout` seconds.
        LabError: the request makes no sense, or a result is not made of plain values and tensors.
    """
    plugins = [plugin] * recipe.world_size if isinstance(plugin, bool) else list(plugin)
    if len(plugins) != recipe.world_size:
        raise LabError(f"plugin has {len(plugins)} answers for {recipe.world_size} ranks")
    if target.count(":") != 1:
        raise LabError(f"target {target!r}: expected 'module:function'")
    job = {
        "target": target,
        "recipe": recipe.to_json(),
        "arguments": dict(arguments or {}),
        "megatron": None if megatron is None else str(Path(megatron).resolve()),
        "timeout": float(timeout),
    }
    environments = [
        {**_environment(rank, recipe.world_size, on, python_path), **(env or {})} for rank, on in enumerate(plugins)
    ]
    try:
        return _run_once(job, environments, logs)
    except RankFailedError as error:
        called = any("function(recipe, " in traceback for traceback in error.tracebacks.values())  # see worker.py
        if called or _UNMET not in str(error):
            raise
        print(
            f"megatron-fp32-router: the ranks could not connect to each other ({_UNMET}); starting them again",
            file=sys.stderr,
        )
        return _run_once(job, environments, logs)


def _run_once(job: Mapping[str, Any], environments: Sequence[Mapping[str, str]], logs: Path | None) -> list[Any]:
    with tempfile.TemporaryDirectory(prefix="fp32-router-lab-") as name:
        folder = Path(name)
        torch.save(job, folder / "job.pt")
        # Before a process is started: what its rank could not read is the caller's mistake.
        _load(folder / "job.pt", "the recipe or the arguments")
        printed = folder if logs is None else logs.resolve()
        with _started(folder, printed, environments) as ranks:
            _wait(folder, printed, ranks, job["timeout"])
        return [_load(folder / f"result-{rank}.pt", f"rank {rank}'s result") for rank in range(len(environments))]


def _environment(rank: int, world_size: int, plugin: bool, python_path: Sequence[str | Path]) -> dict[str, str]:
    # The folder of this package, which may be a checkout that is not installed.
    home = Path(__file__).resolve().parents[2]
    paths = [*(str(Path(path).resolve()) for path in python_path), str(home), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        PREFIX: "1" if plugin else "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
    }


@contextlib.contextmanager
def _started(
    folder: Path, printed: Path, environments: Sequence[Mapping[str, str]]
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The worker processes; none is left when the context ends, however it ends."""
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank, environment in enumerate(environments):
            with (printed / f"rank-{rank}.log").open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "megatron_fp32_router.lab.worker", str(folder), str(rank)],
                    # The worker watches this pipe: if this process is killed outright, it ends too.
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=dict(environment),
                    # A session each, so that the helpers a rank may have started die with it.
                    start_new_session=True,
                )
            ranks.append(process)
        yield ranks
    finally:
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):  # the rank and all its helpers have ended
                os.killpg(process.pid, signal.SIGKILL)
        for process in ranks:
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


def _wait(folder: Path, printed: Path, ranks: Sequence[subprocess.Popen[bytes]], timeout: float) -> None:
    end = time.monotonic() + timeout
    while True:
        codes = [process.poll() for process in ranks]
        if all(code == 0 for code in codes):
            return
        if any(codes):
            _settle(ranks, _GRACE)
            raise _failure(folder, printed, ranks)
        if time.monotonic() > end:
            where = _whereabouts(printed, ranks)
            raise RanksTimedOutError(f"not done after {timeout:g} s, all ranks were killed\n{where}")
        time.sleep(0.02)


def _settle(ranks: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(process.poll() is None for process in ranks):
        time.sleep(0.02)


def _failure(folder: Path, printed: Path, ranks: Sequence[subprocess.Popen[bytes]]) -> RankFailedError:
    """Find the rank that failed first: the others may have failed because it had gone."""
    reports = {
        rank: torch.load(folder / f"error-{rank}.pt", weights_only=True)
        for rank in range(len(ranks))
        if (folder / f"error-{rank}.pt").exists()
    }
    tracebacks = {rank: str(report["traceback"]) for rank, report in reports.items()}
    dead = [rank for rank, process in enumerate(ranks) if process.poll() and rank not in reports]
    if dead:
        # It raised nothing: a signal, sys.exit or a failed start. What the others raised came of that.
        rank = dead[0]
        code = ranks[rank].returncode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        text = _tail(printed / f"rank-{rank}.log")
        return RankFailedError(f"rank {rank} of {len(ranks)} {how}; it last printed:\n{text}", rank, "", tracebacks)
    # Every rank writes its report before it lets go of its peers, so the first report is the cause.
    rank = min(reports, key=lambda rank: float(reports[rank]["when"]))
    return RankFailedError(
        f"rank {rank} of {len(ranks)} failed:\n{tracebacks[rank]}", rank, str(reports[rank]["kind"]), tracebacks
    )


def _whereabouts(printed: Path, ranks: Sequence[subprocess.Popen[bytes]]) -> str:
    """What every rank printed last, with the stacks of those that still run."""
    running = [process for process in ranks if process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGUSR1)  # the worker's faulthandler writes its stacks
    _settle(running, 0.5)
    return "\n".join(
        f"--- rank {rank}{'' if process in running else ' (done)'}:\n{_tail(printed / f'rank-{rank}.log')}"
        for rank, process in enumerate(ranks)
    )


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-_LOG_LINES:]) or "(nothing)"


def _load(path: Path, what: str) -> Any:
    import pickle

    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise LabError(f"{what}: not made of plain values and tensors: {error}") from error
