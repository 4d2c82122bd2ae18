"""Ranks that could not connect to each other are started once more; any other failure is raised at once. A process
that a rank forks can end."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from bootstrap import NEWEST, ensure_release

from megatron_fp32_router import lab
from megatron_fp32_router.lab import launch

UNMET = "RuntimeError: Gloo connectFullMesh failed with [...] Connection closed by peer"


@pytest.mark.parametrize(
    ("traceback", "tries"),
    [
        (f"with parallel(recipe, rank=rank)\n{UNMET}", 2),
        (f"result = function(recipe, job)\n{UNMET}", 1),
        ("with parallel(recipe, rank=rank)\nRuntimeError: something else", 1),
    ],
    ids=["before the call", "in the call", "another reason"],
)
@pytest.mark.parametrize("failures", [1, 2])
def test_only_ranks_that_never_met_are_started_once_more(
    traceback: str, tries: int, failures: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = []

    def once(*arguments: Any) -> list[str]:
        tried.append(arguments)
        if len(tried) <= failures:
            raise lab.RankFailedError(f"rank 0 of 1 failed:\n{traceback}", 0, "RuntimeError", {0: traceback})
        return ["done"]

    monkeypatch.setattr(launch, "_run_once", once)
    if failures < tries:
        assert lab.run_ranks("a:b", lab.Recipe(), plugin=False) == ["done"]
    else:
        with pytest.raises(lab.RankFailedError):
            lab.run_ranks("a:b", lab.Recipe(), plugin=False)
    assert len(tried) == tries
    assert ("starting them again" in capsys.readouterr().err) == (tries == 2)


#: A group in a reference cycle, and a process that is forked with it and then makes enough objects for a collection.
FORKING = """
import gc, os, sys
import torch.distributed as dist
from megatron_fp32_router import lab

lab.prepare(sys.argv[1])
with lab.parallel(lab.Recipe()):
    circle = [dist.new_group([0])]
    circle.append(circle)
    dist.destroy_process_group(circle[0])
    gc.disable()
    del circle
    gc.enable()
    child = os.fork()
    if child == 0:
        kept = [[] for _ in range(1_000_000)]
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_a_forked_process_does_not_wait_for_the_threads_of_a_group_that_it_collects() -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKING, str(ensure_release(NEWEST))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
