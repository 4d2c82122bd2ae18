"""Ranks that could not connect to each other are started once more; any other failure is the caller's at once."""

from __future__ import annotations

from typing import Any

import pytest

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
    assert ("starting them anew" in capsys.readouterr().err) == (tries == 2)
