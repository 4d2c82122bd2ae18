"""What the tests of `check` share: copies of releases with something changed, and the command with --json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bootstrap import ensure_release

from megatron_fp32_router.cli import main
from megatron_fp32_router.patching.source import Tree
from megatron_fp32_router.patching.targets import relied_on

ROUTER = "megatron/core/transformer/moe/router.py"
MOE_UTILS = "megatron/core/transformer/moe/moe_utils.py"
FINALIZE = "megatron/core/distributed/finalize_model_grads.py"
SCHEDULES = "megatron/core/pipeline_parallel/schedules.py"
OFFLOAD = "megatron/core/optimizer/cpu_offloading/hybrid_optimizer.py"
INFO = "megatron/core/package_info.py"

Copy = Callable[..., Path]


def copier(folder: Path) -> Copy:
    """`copy(release, file, old, new)`: the files that `check` reads of a release, one of them edited."""

    def make(release: str, file: str = "", old: str = "", new: str = "", count: int = 1) -> Path:
        tree = folder / f"tree-{release}"
        for name in (*files(release), INFO):
            source = ensure_release(release) / name
            if source.exists():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, tree / name)
        if file:
            text = (tree / file).read_text(encoding="utf-8")
            assert text.count(old) == count
            (tree / file).write_text(text.replace(old, new), encoding="utf-8")
        return tree

    return make


def files(release: str) -> list[str]:
    """The files that `check` reads."""
    modules = dict.fromkeys(name.partition(":")[0] for name in relied_on())
    return [Tree(ensure_release(release)).file_of(module) for module in modules]


def check(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, dict[str, Any]]:
    code = main(["check", "--json", *map(str, arguments)])
    return code, json.loads(capsys.readouterr().out)


def states(report: dict[str, Any]) -> dict[str, str]:
    """The targets that are not as in their release, by the last part of their names."""
    return {t["target"].rpartition(".")[2]: t["state"] for t in report["targets"] if t["state"] != "match"}
