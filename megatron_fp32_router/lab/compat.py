"""What Megatron releases need here, mostly old ones with a new torch and NumPy. None of it is about CUDA or routing.

Each function says which releases need it, and changes something only where something is missing. Names that are
missing are defined; Megatron's behaviour stays as it is, except that uninitialised memory gets numbers.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import inspect
import sys
import types
import typing
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import wrapt
from packaging.version import Version

from megatron_fp32_router.lab.recipe import LabError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence


_CHECKPOINTS = "megatron.core.dist_checkpointing"


def megatron_version() -> str:
    """Version of the Megatron in use, as its package_info states it, for example "0.16.1"."""
    return str(import_module("megatron.core.package_info").__version__)


def before_import(tree: Path | None, *, training: bool = False) -> None:
    """Apply what must be there when Megatron is imported. Imports NumPy and torch, nothing of Megatron.

    Args:
        tree: the directory that holds `megatron/`; None: wherever it is on sys.path.
        training: megatron.training will be imported too, which needs triton from 0.16 on.
    """
    import numpy as np

    # 0.11 to 0.15 use the name, which NumPy 2 does not have.
    if not hasattr(np, "product"):
        np.product = np.prod  # type: ignore[attr-defined]
    emerging = find_spec("emerging_optimizers") is not None
    if training or emerging or _needs_triton(tree):
        _triton_stub()
    wrapt.register_post_import_hook(_fork_results_queue, f"{_CHECKPOINTS}.strategies.filesystem_async")
    # emerging-optimizers needs Python 3.12 for this name, and for nothing else.
    if emerging and not hasattr(typing, "override"):
        typing.override = lambda function: function  # type: ignore[attr-defined]


def after_import() -> None:
    """Apply what needs Megatron's modules; imports those it needs. Idempotent."""
    moe_utils = import_module("megatron.core.transformer.moe.moe_utils")
    # 0.13.1 to 0.16.1 without TransformerEngine: the name is used, but never defined.
    if "te_general_gemm" in _names(moe_utils) and not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]
    empty_fp8_list()
    version_of_nothing()
    if _minor() in (11, 12):
        _write_item_of_its_time()


def fill_router_biases(module: torch.nn.Module) -> None:
    """Initialise the routers' linear `bias`, which 0.15 leaves uninitialised; from 0.16 on Megatron does the same."""
    if _minor() != 15:
        return
    router_class = import_module("megatron.core.transformer.moe.router").Router
    for router in module.modules():
        if isinstance(router, router_class) and getattr(router, "bias", None) is not None:  # not every 0.15 has it
            router.config.init_method(router.bias)


def signature_kwargs(function: Callable[..., Any], **candidates: Any) -> dict[str, Any]:
    """Those of `candidates` that `function` names among its parameters."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in candidates.items() if name in known}


@contextlib.contextmanager
def replaced(changes: Iterable[tuple[Any, str, Any]], *, create: bool = False) -> Iterator[None]:
    """Set attributes, given as (owner, name, value), while this is open.

    Raises:
        AttributeError: an owner has no attribute of that name, and `create` is off.
    """
    with contextlib.ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(mock.patch.object(owner, name, value, create=create))
        yield


def _minor() -> int:
    return int(megatron_version().split(".")[1])


def _names(module: types.ModuleType) -> set[str]:
    """Every global name that the functions of `module` refer to."""
    found: set[str] = set()
    for value in list(vars(module).values()):
        members = vars(value).values() if isinstance(value, type) and value.__module__ == module.__name__ else (value,)
        for member in members:
            code = getattr(inspect.unwrap(getattr(member, "__func__", member)), "__code__", None)
            if code is not None:
                found.update(code.co_names)
    return found


def empty_fp8_list() -> None:
    """Let 0.12 quantize an empty list, as every bf16 step asks it to; without TransformerEngine it refuses."""
    try:
        fp8_utils = import_module("megatron.core.fp8_utils")
    except ModuleNotFoundError:
        return  # 0.11
    real = getattr(fp8_utils, "_quantize_param_shard_impl", None)
    if real is None or getattr(real, "_lab_allows_empty", False):
        return

    @functools.wraps(real)
    def quantize(model_params: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        return real(model_params, *args, **kwargs) if len(model_params) else None

    quantize._lab_allows_empty = True  # type: ignore[attr-defined]
    fp8_utils._quantize_param_shard_impl = quantize  # type: ignore[attr-defined]


def version_of_nothing() -> None:
    """Say that TransformerEngine has version 0.0.0 where it is not installed, as later releases do.

    Up to 0.15 Megatron asks for the version when it loads or offloads, and stops if there is none. It keeps the first
    answer.
    """
    utils = import_module("megatron.core.utils")
    if find_spec("transformer_engine") is None and getattr(utils, "_te_version", 0) is None:
        utils._te_version = Version("0.0.0")  # type: ignore[attr-defined]


def _write_item_of_its_time() -> None:
    """Replace _write_item in Megatron's module, not in torch's. The writer processes are forks, and inherit it."""
    writer = import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    if getattr(writer, "_write_item", None) is import_module("torch.distributed.checkpoint.filesystem")._write_item:
        writer._write_item = write_item_of_any_time()  # type: ignore[attr-defined]


def write_item_of_any_time() -> Any:
    """torch's private _write_item for 0.11 and 0.12, which leave out transforms and format, as an older torch did."""
    filesystem = import_module("torch.distributed.checkpoint.filesystem")
    real = filesystem._write_item
    known = inspect.signature(real).parameters
    if "serialization_format" not in known:
        return real

    @functools.wraps(real)
    def write_item(*args: Any, **kwargs: Any) -> Any:
        if len(args) + len(kwargs) == len(known):
            return real(*args, **kwargs)
        transforms = () if "transforms" not in known or len(args) > 4 else (filesystem._StorageWriterTransforms(),)
        return real(*transforms, *args, filesystem.SerializationFormat.TORCH_SAVE)

    return write_item


def _fork_results_queue(writers: Any) -> None:
    """Fork the process that holds the results queue of a checkpoint's writers; Megatron spawns it in every rank.

    A spawned process imports torch and the program again, which takes longer than a tiny model trains; a forked one
    does not. Where Megatron has no such function, saving is only slower.
    """
    name = "get_write_results_queue" if hasattr(writers, "get_write_results_queue") else "_get_write_results_queue"
    real = getattr(writers, name, None)
    if real is None or hasattr(real, "_lab_forks"):
        return

    @functools.wraps(real)
    def results_queue(*args: Any) -> Any:
        if writers._results_queue is None:
            writers._results_queue = torch.multiprocessing.get_context("fork").Manager().Queue()
        return real(*args)

    results_queue._lab_forks = True  # type: ignore[attr-defined]
    setattr(writers, name, results_queue)


class FusedAdamLike(torch.optim.Optimizer):
    """Adam that keeps `step` in the parameter group, as apex's and TransformerEngine's FusedAdam do.

    Same arithmetic as torch.optim.AdamW, in fp32. A stand-in for testing checkpoint formats on a CPU.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **ignored: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = count = int(group.get("step", 0)) + 1
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                # As TransformerEngine's, for a parameter without gradient too: Megatron-FSDP's checkpoints need it.
                state = self.state[param]
                if not state:
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
                if param.grad is None:
                    continue
                grad = param.grad.to(param.dtype)
                param.mul_(1 - group["lr"] * group["weight_decay"])
                state["exp_avg"].lerp_(grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                root = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt_().add_(group["eps"])
                param.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - beta1**count))


# triton: 0.18 and later, and emerging-optimizers, import it without a guard; no kernel of it runs here ------------


class _Anything(types.ModuleType):
    """A module that has every attribute: classes that take any arguments, decorators that change nothing."""

    __path__: list[str] = []  # noqa: RUF012 (import machinery looks for a plain list)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[:1].isupper():
            return type(name, (), {"__init__": lambda self, *args, **kwargs: None})
        return _decorator


def _decorator(*args: Any, **kwargs: Any) -> Any:
    if len(args) == 1 and callable(args[0]) and not kwargs:
        return args[0]
    return _decorator


class _TritonStub(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `triton` and everything below it. It is the last finder, so an installed triton wins."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "triton":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _Anything(spec.name)
        module.__version__ = "0.0.0"  # type: ignore[attr-defined]
        return module

    def exec_module(self, module: types.ModuleType) -> None: ...


def _needs_triton(tree: Path | None) -> bool:
    for root in [tree] if tree is not None else map(Path, sys.path):
        core = root / "megatron" / "core"
        converter = core / "fusions" / "fused_indices_converter.py"
        # Main of spring 2025 decorates its kernels whether triton is there or not.
        if converter.is_file() and "triton = None" in converter.read_text(encoding="utf-8"):
            return True
        if (core / "transformer" / "moe" / "paged_stash.py").is_file():
            return True
    return False


def _triton_stub() -> None:
    if any(isinstance(finder, _TritonStub) for finder in sys.meta_path):
        return
    # torch keeps the answer to this question: ask before the stub makes it wrong.
    import torch.utils._triton as torch_triton

    if not torch_triton.has_triton_package():
        # Every torch.compile imports inductor, which looks for triton: let it find none before the stub is there.
        import_module("torch._inductor.codecache")
        sys.meta_path.append(_TritonStub())


def check_release(recipe_router_dtype: str | None) -> None:
    """Raise LabError for what this release cannot do. 0.11 has no moe_router_dtype."""
    if recipe_router_dtype is not None and _minor() == 11:
        raise LabError(
            f"router_dtype={recipe_router_dtype!r}: Megatron {megatron_version()} has no moe_router_dtype; "
            "leave it unset, or take 0.12 or later"
        )
