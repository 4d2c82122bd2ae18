"""TransformerEngine as far as consumers import it: names, of which none computes anything.

Their models are built from Megatron's local layers, so that nothing of it runs: a class is an empty Module, a function
raises. Import this before Megatron.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any

import torch

#: What Megatron calls in every model where it finds TransformerEngine.
_ANSWERS = {
    "cpu_offload.get_cpu_offload_context": lambda *args, **kwargs: (contextlib.nullcontext(), None),
    "attention._SplitAlongDim.apply": lambda tensor, dim, sizes: torch.split(tensor, sizes, dim),
    "optimizers.multi_tensor_applier": lambda op, overflow, lists, *args: op(2048 * 32, overflow, lists, *args),
}


class _Stub(types.ModuleType):
    """A module of TransformerEngine's; what it holds is a class, or another such module that may be a function."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[:1].isupper():
            value: Any = type(name, (torch.nn.Module,), {"__module__": self.__name__})
        else:
            value = importlib.import_module(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        answer = _ANSWERS.get(self.__name__.removeprefix("transformer_engine.pytorch."))
        if answer is None:
            raise NotImplementedError(f"{self.__name__} is a stub")
        return answer(*args, **kwargs)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules `roots`, and everything below them."""

    def __init__(self, *roots: str) -> None:
        self.roots = roots

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not any(f"{name}.".startswith(f"{root}.") for root in self.roots):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        stub = _Stub(spec.name)
        vars(stub)["__version__"] = "2.20.2"
        return stub

    def exec_module(self, module: types.ModuleType) -> None: ...


sys.meta_path.append(Finder("transformer_engine"))
