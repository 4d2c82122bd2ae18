"""Frameworks that train with Megatron, installed from the package index and run with the plugin off and on.

Each is a program of its own in programs/, in a process of its own: they change Megatron for good.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bootstrap import TREES, ensure_consumers, ensure_release, ensure_tree
from installing import ROOT, clean_environment

PROGRAMS = Path(__file__).parent / "programs"


@dataclass(frozen=True)
class Run:
    """What a consumer's program printed, and what it saw."""

    output: str
    seen: dict[str, Any]

    def said(self, text: str) -> bool:
        """Whether a line of the plugin's holds `text`."""
        return any(text in line for line in self.output.splitlines() if "megatron_fp32_router" in line)

    def state(self, record: str) -> str:
        """The state of a patch, as status() gave it at the end."""
        return str(self.seen["status"][record][0])

    def displaced(self) -> set[str]:
        """The patches that somebody else's function sits on."""
        return {name for name, (state, _) in self.seen["status"].items() if state == "displaced"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """`run(program, megatron, plugin, **variables)`: the program on a release, checkout or folder, once per module."""
    done: dict[tuple[str, str | Path, bool], Run] = {}

    def start(program: str, megatron: str | Path, plugin: bool, **variables: str) -> Run:
        key = (program, megatron, plugin)
        if key not in done:
            done[key] = _start(tmp_path_factory.mktemp(program), *key, variables)
        return done[key]

    return start


def _start(folder: Path, program: str, megatron: str | Path, plugin: bool, variables: dict[str, str]) -> Run:
    if isinstance(megatron, Path):
        tree = megatron
    else:
        tree = ensure_tree(megatron) if megatron in TREES else ensure_release(megatron)
    paths = (PROGRAMS, ROOT / "tests" / "programs" / "pretence", *ensure_consumers(Path(sys.executable)), tree)
    wanted = {
        "LAB": str(ROOT / "megatron_fp32_router" / "lab"),
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(folder),
        **variables,
        **({"MEGATRON_FP32_ROUTER": "1"} if plugin else {}),
    }
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", PROGRAMS / f"{program}.py", folder],
        env=clean_environment(*paths, **wanted),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    return Run(ended.stdout, json.loads((folder / "seen.json").read_text(encoding="utf-8")))
