"""The shape of the package: a mechanism goes with its folder, and imports point one way."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bootstrap import NEWEST, ROOT, ensure_release
from installing import copy_of_repository

PACKAGE = ROOT / "megatron_fp32_router"

#: What may import what: only what stands above it. Names on one line do not import each other. Contracts are facts that
#: gating reads where MEGATRON_FP32_ROUTER_LIKE names an engine.
ORDER = (
    ("version", "errors"),
    ("settings", "log", "pages", "serving/contracts"),
    ("terminal",),
    ("patching",),
    ("casts",),
    ("gating", "padding_mask"),
    ("wrapping",),
    ("ranks",),
    ("balance", "optimizers"),
    ("monitor", "source_patches"),
    ("lab",),
    ("compat",),
)


def test_the_others_work_without_the_folders_of_two_mechanisms(tmp_path: Path) -> None:
    copy = copy_of_repository(tmp_path)
    for mechanism in ("padding_mask", "optimizers/refit"):
        shutil.rmtree(copy / "megatron_fp32_router" / mechanism)
    for name in ("test_refit.py", "test_renamed.py"):
        (copy / "tests" / "megatron" / name).unlink()
    files = [f"tests/megatron/test_{name}.py" for name in ("defects", "casts", "gating", "balance", "patches")]
    chosen = ["--megatron", str(ensure_release(NEWEST)), "-k", "not d23 and not padding", *files]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--disable-warnings", *chosen],
        cwd=copy,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    seen = "from megatron_fp32_router.patching import records as r; print(r.__file__, *(p.id for p in r.PATCHES))"
    listed = subprocess.run([sys.executable, "-c", seen], cwd=copy, capture_output=True, text=True, check=True).stdout
    assert listed.startswith(str(copy))
    assert "router-casts" in listed
    assert "padding-mask" not in listed
    assert "refit-" not in listed


def imported(file: Path) -> Iterator[str]:
    """Every module of the package that a file imports, at its top or in a function, as a path below the package."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE.name:
            module = (node.module or "").replace(".", "/").removeprefix(PACKAGE.name).lstrip("/")
            for name in node.names:
                path = f"{module}/{name.name}".lstrip("/")
                is_module = (PACKAGE / path).is_dir() or (PACKAGE / f"{path}.py").exists()
                yield path if is_module else module


def test_imports_point_one_way_and_none_hides_in_a_function() -> None:
    floor = {name: index for index, names in enumerate(ORDER) for name in names}
    climbs = []
    for name in floor:
        files = (
            [PACKAGE / f"{name}.py"] if (PACKAGE / f"{name}.py").exists() else sorted((PACKAGE / name).rglob("*.py"))
        )
        for file in files:
            for target in imported(file):
                other = target if target in floor else target.partition("/")[0]
                if other and other != name and floor.get(other, len(ORDER)) >= floor[name]:
                    climbs.append(f"{file.relative_to(PACKAGE)} imports {target}")
    assert climbs == []


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    modules = {str(file.relative_to(PACKAGE).with_suffix("")): file for file in PACKAGE.rglob("*.py")}
    needs = {name: {target for target in imported(file) if target in modules} for name, file in modules.items()}
    while leaves := [name for name, others in needs.items() if not others & needs.keys()]:
        for name in leaves:
            del needs[name]
    assert needs == {}
