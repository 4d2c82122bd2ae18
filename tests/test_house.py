"""The shape of the package: a mechanism goes with its folder, and imports point one way."""

from __future__ import annotations

import ast
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.machinery import SourceFileLoader
from pathlib import Path

from bootstrap import NEWEST, ROOT, ensure_release
from installing import copy_of_repository

from megatron_fp32_router.patching.records import PATCHES

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


#: Lines of code that a training imports, with the monitor off and on.
MOST_IMPORTED = (2_217, 3_000)


def test_a_training_imports_what_it_uses_and_no_more() -> None:
    loader = SourceFileLoader("size", str(ROOT / "scripts" / "size"))
    spec = importlib.util.spec_from_loader("size", loader)
    assert spec is not None
    size = importlib.util.module_from_spec(spec)
    loader.exec_module(size)
    for files, most in zip(size.imported(), MOST_IMPORTED, strict=True):
        counted = {str(file.relative_to(PACKAGE)): size.lines_of_code(file) for file in files}
        assert sum(counted.values()) <= most, counted
    # What one process with the distributed optimizer has no use for.
    unused = (
        "ranks/agreement",
        "optimizers/refit/repair",
        "optimizers/offload/repair",
        "gating/split",
        "patching/misfit",
    )
    assert not {f"{name}.py" for name in unused} & counted.keys()


def test_every_record_names_a_function_that_is_there() -> None:
    for patch in PATCHES:
        assert callable(getattr(import_module(patch.factory.__module__), patch.factory.__name__)), patch.id


def changes(file: Path) -> Iterator[str]:
    """The names at the top of a file that hold an empty container, or that a function assigns to."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            value = node.value
            empty = isinstance(value, (ast.List, ast.Dict)) and not ast.unparse(value).strip("[]{}")
            made = isinstance(value, ast.Call) and not value.args and not value.keywords
            if empty or (made and ast.unparse(value.func).endswith(("set", "Set", "dict", "Dictionary", "_Registry"))):
                yield ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
    for inner in ast.walk(tree):
        if isinstance(inner, ast.Global):
            yield from inner.names


def test_every_place_with_state_is_on_the_page_about_it() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    state = page.partition("## State")[2].partition("## How large")[0]
    others = {"lab", "compat", "audit", "serving"}  # commands, which end with their process
    files = [file for file in PACKAGE.rglob("*.py") if file.relative_to(PACKAGE).parts[0] not in others]
    found = {str(file.relative_to(PACKAGE)) for file in files if list(changes(file))}
    assert "patching/registry.py" in found
    assert "casts/router.py" in found
    assert {name for name in found if f"`{name}`" not in state} == set()
