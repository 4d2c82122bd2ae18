"""TransformerEngine's own FusedAdam and fused router on a CPU: its Python as it is, its kernels from kernels.py.

The rest of TransformerEngine needs its compiled part and a GPU. Imported here are only the folder
`pytorch/optimizers`, or `pytorch/router.py` and `general_gemm`, and what these need; the `__init__` of the packages
above them does not run. Megatron's optimizers see them while `in_use` is open, its routers while `router_in_use` is;
the rest of Megatron never does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import sys
import types
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from packaging.version import Version

from megatron_fp32_router.lab import compat, kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Packages of which only parts are imported.
_WITHOUT_INIT: Final = tuple(
    ["", ".common", ".debug", ".debug.pytorch", ".pytorch"]
    + [f".pytorch.{name}" for name in ("tensor", "tensor.storage", "cpp_extensions", "custom_recipes")]
)
_DTYPES: Final = "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1"
#: Packages that are taken out of sys.modules again.
_ROOTS: Final = ("transformer_engine", "transformer_engine_torch", "pydantic")
#: Modules that bind names of TransformerEngine when they are imported.
_HOMES: Final = tuple(
    f"megatron.core.optimizer{part}"
    for part in ("", ".clip_grads", ".optimizer", ".optimizer_config", ".distrib_optimizer")
)

#: While `in_use` is open, the class: pickle has to find it here, since checkpoints of an offloaded optimizer hold it.
FusedAdam: Any = None


class _Indices:
    """Enumerations that constants.py copies; nothing here reads them."""

    def __getattr__(self, name: str) -> int:
        return 0


class _Compiled(types.ModuleType):
    """transformer_engine_torch, the compiled part: the kernels that FusedAdam and Megatron call."""

    DType = enum.IntEnum("DType", _DTYPES, start=0)
    multi_tensor_adam = staticmethod(kernels.adam)
    multi_tensor_adam_param_remainder = staticmethod(kernels.adam_param_remainder)
    multi_tensor_l2norm = staticmethod(kernels.l2norm)
    multi_tensor_scale = multi_tensor_scale_tensor = staticmethod(kernels.scale)
    FP8FwdTensors = FP8BwdTensors = _Indices()
    quantize = staticmethod(kernels.quantize)
    create_empty_quantized_tensor = staticmethod(kernels.empty_quantized)
    generic_gemm = staticmethod(kernels.gemm)
    NVTERoutingMapFormat = enum.IntEnum("NVTERoutingMapFormat", "BYTEMAP BITMAP_U8", start=0)
    NVTEQBHistogramMode = enum.IntEnum("NVTEQBHistogramMode", "TWO_KERNEL FUSED_ATOMIC", start=0)
    fused_topk_with_score_function_fwd = staticmethod(kernels.fused_topk)
    fused_topk_with_score_function_bwd = staticmethod(kernels.fused_topk_backward)
    fused_score_for_moe_aux_loss_fwd = staticmethod(kernels.fused_scores)
    fused_score_for_moe_aux_loss_bwd = staticmethod(kernels.fused_scores_backward)
    fused_moe_aux_loss_fwd = fused_moe_aux_loss_fwd_graph_safe = staticmethod(kernels.fused_aux_loss)
    fused_moe_aux_loss_bwd = staticmethod(kernels.fused_aux_loss_backward)

    def __getattr__(self, name: str) -> Any:
        """Any other name exists, but cannot be called."""
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"transformer_engine_torch.{name} is not among the laboratory's kernels")

        return missing


@functools.cache
def _imported(tree: Path, *names: str) -> dict[str, types.ModuleType]:
    """The modules `names` of transformer_engine.pytorch and what they need, taken out of sys.modules again."""
    stubs = {f"transformer_engine{part}": types.ModuleType(f"transformer_engine{part}") for part in _WITHOUT_INIT}
    for name, module in stubs.items():
        module.__path__ = [str(tree / name.replace(".", "/"))]
    vars(stubs["transformer_engine.common"])["decode_cudnn_version"] = None
    needed = {
        **stubs,
        "transformer_engine_torch": _Compiled("transformer_engine_torch"),
        # Its recipes check their fields with pydantic. No recipe is made here.
        "pydantic": types.ModuleType("pydantic"),
        "pydantic.dataclasses": types.ModuleType("pydantic.dataclasses"),
    }
    vars(needed["pydantic.dataclasses"])["dataclass"] = dataclasses.dataclass
    before = dict(sys.modules)
    _forget()  # a stub may be there
    sys.modules.update(needed)
    try:
        for name in names:
            import_module(f"transformer_engine.pytorch.{name}")
        return {name: module for name, module in sys.modules.items() if name.startswith("transformer_engine")}
    finally:
        _restore(before)


@contextlib.contextmanager
def in_use(tree: Path, version: str = "") -> Iterator[Any]:
    """Let Megatron's optimizers find TransformerEngine below `tree`; yields `transformer_engine.pytorch.optimizers`.

    Args:
        tree: the folder into which the wheel `transformer-engine` is unpacked, which holds Python only.
        version: what Megatron is told, which decides by it what it uses; by default the real one.
    """
    modules = _imported(tree, "optimizers")
    optimizers = modules["transformer_engine.pytorch.optimizers"]
    names = {
        "Adam": optimizers.FusedAdam,
        "USING_PYTORCH_OPTIMIZER": False,
        "HAVE_APEX_OR_TE": True,
        "USING_TE_OPTIMIZER": True,
        "is_te_min_version": _is_te_min_version(tree, version),
        # Called through Megatron's own local_multi_tensor_applier, which hands on what TransformerEngine's does.
        "l2_norm_impl": kernels.l2norm,
        "multi_tensor_scale_impl": kernels.scale,
        "multi_tensor_scale_tensor_impl": kernels.scale,
    }
    homes = [import_module(name) for name in _HOMES]
    changes = [(home, name, value) for home in homes for name, value in names.items() if hasattr(home, name)]
    config = import_module("megatron.core.optimizer").OptimizerConfig
    check = config.__post_init__

    def __post_init__(self: Any) -> None:
        """Look for FusedAdam, as the check of the precision-aware optimizer does."""
        before = dict(sys.modules)
        sys.modules.update(modules)
        try:
            check(self)
        finally:
            _restore(before)

    changes.append((config, "__post_init__", __post_init__))
    changes += [
        (sys.modules[__name__], "FusedAdam", optimizers.FusedAdam),
        (optimizers.FusedAdam, "__module__", __name__),
    ]
    with compat.replaced(changes):
        yield optimizers


@contextlib.contextmanager
def router_in_use(tree: Path) -> Iterator[Any]:
    """Let Megatron's routers find TransformerEngine below `tree`: fused routing, and the product for logits.

    Args:
        tree: as for `in_use`.

    Yields:
        The module `transformer_engine.pytorch.router`.
    """
    modules = _imported(tree, "router", "cpp_extensions.gemm")
    router, product = (modules[f"transformer_engine.pytorch.{name}"] for name in ("router", "cpp_extensions.gemm"))
    # The original asks the GPU for its size.
    vars(product)["get_cublas_workspace"] = lambda *_: torch.empty(0, dtype=torch.uint8)

    def te_general_gemm(a: Any, b: Any, out_dtype: Any = None, layout: str = "TN", **kwargs: Any) -> Any:
        """Megatron's own, which it does not define without TransformerEngine."""
        return product.general_gemm(a, b, out_dtype=out_dtype, layout=layout, **kwargs)

    fused = ("fused_topk_with_score_function", "fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss")
    names = {
        "HAVE_TE": True,
        "te_general_gemm": te_general_gemm,
        "is_te_min_version": _is_te_min_version(tree),
        **{name: getattr(router, name) for name in fused},
    }
    home = import_module("megatron.core.transformer.moe.moe_utils")
    # Up to 0.17 names that could not be imported are not there at all.
    with compat.replaced([(home, name, value) for name, value in names.items()], create=True):
        yield router


def _is_te_min_version(tree: Path, version: str = "") -> Callable[..., bool]:
    """Megatron's function of that name, for TransformerEngine below `tree`. `version`: as for `in_use`."""
    told = Version(version or next(tree.glob("transformer_engine-*.dist-info")).stem.partition("-")[2])
    return lambda least, *_, **__: told >= Version(least)


def _forget() -> None:
    """Take every module of _ROOTS out of sys.modules."""
    for name in [name for name in sys.modules if name.partition(".")[0] in _ROOTS]:
        del sys.modules[name]


def _restore(before: dict[str, types.ModuleType]) -> None:
    """Take every module of _ROOTS out of sys.modules, and put back those that were there before."""
    _forget()
    sys.modules.update({name: module for name, module in before.items() if name.partition(".")[0] in _ROOTS})
