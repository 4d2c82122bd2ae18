"""Makes a CPU pass for CUDA in every rank of a program that has this folder on its path.

The laboratory's code does it, loaded from its files: importing it by name would import the package, and the
tests are about programs that do not. LAB names the folder that holds the code, PRETENCE the file that answers: `cpu`
(the default) where a program uses megatron.core, `cpu_program` where it uses megatron.training. OBSERVE, if set, is
the folder that observer.py writes into.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from importlib.machinery import PathFinder
from pathlib import Path


def load(name: str) -> types.ModuleType:
    """Execute one file of the laboratory as a module that nobody else can see."""
    spec = importlib.util.spec_from_file_location(f"pretence_{name}", Path(os.environ["LAB"]) / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pretend() -> None:
    """Load what is needed of the laboratory, and let it answer."""
    answering = os.environ.get("PRETENCE", "cpu")
    # The files take each other, and an exception, from the package. They are given a stand-in while they are loaded.
    lab = types.ModuleType("megatron_fp32_router.lab")
    recipe = types.ModuleType("megatron_fp32_router.lab.recipe")
    recipe.LabError = RuntimeError  # type: ignore[attr-defined]
    stand_ins = {
        "megatron_fp32_router": types.ModuleType("megatron_fp32_router"),
        "megatron_fp32_router.lab": lab,
        "megatron_fp32_router.lab.recipe": recipe,
    }
    sys.modules.update(stand_ins)
    try:
        for name in dict.fromkeys(("cpu_gloo", "cpu", "compat", "cpu_fsdp", answering)):
            setattr(lab, name, load(name))
    finally:
        for name in stand_ins:
            del sys.modules[name]
    # It keeps a table of torch's functions, and refuses two names for one, which the pretence makes.
    import torch._dynamo  # noqa: F401

    lab.compat.before_import(None)  # type: ignore[attr-defined]
    getattr(lab, answering).pretend()


# torch.distributed.run is no rank, and needs nothing; nor does the process that multiprocessing starts to clean up
# after those that write checkpoints. Importing torch there would take as long as the training.
if "RANK" in os.environ and not any("multiprocessing.resource_tracker" in argument for argument in sys.orig_argv):
    pretend()
    if "OBSERVE" in os.environ:
        import observer  # noqa: F401

# What a sitecustomize.py further down the path would have done is still done.
here = str(Path(__file__).parent)
following = PathFinder.find_spec("sitecustomize", [entry for entry in sys.path if entry != here])
if following is not None and following.loader is not None:
    following.loader.exec_module(importlib.util.module_from_spec(following))
