"""One rank of `lab.run_ranks`: python -m megatron_fp32_router.lab.worker FOLDER RANK

FOLDER holds job.pt; `result-RANK.pt` or `error-RANK.pt` is written into it. Importing the package has armed the
plugin, or not, as MEGATRON_FP32_ROUTER says, before Megatron is imported here.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch

from megatron_fp32_router.lab.groups import parallel, prepare
from megatron_fp32_router.lab.recipe import LabError, Recipe


def _end_with_parent() -> None:
    """End this rank and all it has started when the process that launched it is gone."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _write(value: Any, path: Path) -> None:
    # Renamed when it is complete: the launcher may read at any moment.
    partial = path.with_suffix(".partial")
    torch.save(value, partial)
    partial.replace(path)


def _fail(error: BaseException, folder: Path, rank: int) -> NoReturn:
    """Report, then exit: the peers must not notice that this rank has gone before its report is on disk."""
    kind = f"{type(error).__module__}.{type(error).__qualname__}"
    report = {"when": time.monotonic(), "kind": kind, "traceback": traceback.format_exc()}
    _write(report, folder / f"error-{rank}.pt")
    traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through destroy_process_group(), which may wait for peers that wait for this rank.
    os._exit(1)


def _run(folder: Path, rank: int) -> None:
    try:
        job = torch.load(folder / "job.pt", weights_only=True)
        recipe = Recipe.from_json(job["recipe"])
        prepare(job["megatron"])
        module, _, name = job["target"].partition(":")
        function = getattr(importlib.import_module(module), name, None)
        if function is None:
            raise LabError(f"target {job['target']!r}: {module} has no {name}")
        store = torch._C._distributed_c10d.FileStore(str(folder / "store"), recipe.world_size)
        with parallel(recipe, rank=rank, store=store, timeout=job["timeout"]):
            try:
                result = function(recipe, job["arguments"])
                _write(result, folder / f"result-{rank}.pt")
                # No rank may take the groups down while another one still uses them.
                torch.distributed.barrier()
            except BaseException as error:
                _fail(error, folder, rank)
    except BaseException as error:
        _fail(error, folder, rank)


def main(folder: str, rank: str) -> None:
    """Do the job in `folder` as rank `rank`."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    _end_with_parent()
    torch.set_num_threads(1)
    _run(Path(folder), int(rank))


if __name__ == "__main__":
    # Guarded: Megatron's checkpoint writers are processes that import this module again.
    main(*sys.argv[1:])
