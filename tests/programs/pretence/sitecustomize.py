"""Makes a CPU pass for CUDA in every interpreter that has this folder on its path, for train.py's sake.

The laboratory's code does it, loaded from its files: importing it by name would import the package, and the
test is about programs that do not. LAB names the folder that holds the code.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path


def load(name: str) -> types.ModuleType:
    """Execute one file of the laboratory as a module that nobody else can see."""
    spec = importlib.util.spec_from_file_location(f"pretence_{name}", Path(os.environ["LAB"]) / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Both files take their exception from the package. They are given a stand-in for as long as they are loaded.
recipe = types.ModuleType("megatron_fp32_router.lab.recipe")
recipe.LabError = RuntimeError  # type: ignore[attr-defined]
stand_ins = {
    "megatron_fp32_router": types.ModuleType("megatron_fp32_router"),
    "megatron_fp32_router.lab": types.ModuleType("megatron_fp32_router.lab"),
    "megatron_fp32_router.lab.recipe": recipe,
}
sys.modules.update(stand_ins)
try:
    cpu, compat = load("cpu"), load("compat")
finally:
    for name in stand_ins:
        del sys.modules[name]
# It keeps a table of torch's functions, and refuses two names for one, which the pretence makes.
import torch._dynamo  # noqa: E402, F401

compat.before_import(None)
cpu.pretend()
