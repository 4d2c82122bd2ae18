"""What an interpreter start costs: without the plugin, with it installed and off, and with it on and no Megatron."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import venv
from pathlib import Path
from typing import Any

from benchmarks.pairs import Report, clock

ROOT = Path(__file__).resolve().parents[2]

#: What an installation adds to site-packages, where every interpreter looks when it starts.
INSTALLED = (
    "_megatron_fp32_router_startup.py",
    "megatron_fp32_router.pth",
    "megatron_fp32_router.start",
    "megatron_fp32_router",
)

#: Its dependencies, which "on" imports.
NEEDED = ("wrapt", "packaging")

WAYS = {"absent": ("without", None), "off": ("with", None), "on": ("with", "1")}


def _make_environment(home: Path, with_plugin: bool) -> Path:
    """Make an environment that holds the plugin's files or nothing; return its interpreter."""
    venv.create(home, with_pip=False, symlinks=os.name != "nt")
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    look = "import sysconfig; print(sysconfig.get_path('purelib'))"
    found = subprocess.run([python, "-c", look], check=True, capture_output=True, text=True)
    site = Path(found.stdout.strip())
    for name in INSTALLED if with_plugin else ():
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, site / name)
    for name in NEEDED if with_plugin else ():
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        shutil.copytree(Path(spec.origin).parent, site / name)
    return python


def measure(starts: int, report: Report) -> dict[str, Any]:
    """Start the three `starts` times in turn; medians in milliseconds, differences pair by pair."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MEGATRON_FP32_ROUTER", "PYTHON"))}
    with tempfile.TemporaryDirectory() as work:
        report("making two environments")
        pythons = {name: _make_environment(Path(work) / name, name == "with") for name in ("without", "with")}

        def start(way: str) -> float:
            python, value = WAYS[way]
            environment = clean if value is None else {**clean, "MEGATRON_FP32_ROUTER": value}
            return clock(lambda: subprocess.run([pythons[python], "-c", "pass"], env=environment, check=True))

        # The first starts read from the disk and write byte code, and are not measured.
        for way in [*WAYS] * 3:
            start(way)
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn in range(starts):
            report(f"{turn + 1} of {starts} starts of each kind")
            for way in random.sample([*WAYS], k=3):
                times[way].append(start(way))
    result: dict[str, Any] = {"starts": starts}
    for way in WAYS:
        differences = sorted(t - t0 for t0, t in zip(times["absent"], times[way], strict=True))
        result[way] = {
            "ms": statistics.median(times[way]),
            "more_ms": statistics.median(differences),
            "more_from_ms": differences[starts // 4],
            "more_to_ms": differences[-1 - starts // 4],
        }
    return result
