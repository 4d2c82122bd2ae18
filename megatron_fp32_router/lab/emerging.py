"""Muon and the others of the package emerging-optimizers, in version 0.3.0 for every Megatron that uses the package.

0.16 was written for version 0.1.0, which is on no package index. Muon's arithmetic is the same there, but arguments
were renamed since: `momentum_beta` is now `momentum`, `use_nesterov` is `nesterov`, `mode` is `tp_mode`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final
from unittest import mock

_MUON: Final = "megatron.core.optimizer.muon"


def is_emerging(name: str) -> bool:
    """Whether OptimizerConfig.optimizer of that name is from the package."""
    return name not in ("adam", "sgd")


def optimizer_of(settings: Any, chunks: list[Any]) -> Any:
    """The optimizer that `settings.optimizer` names, as Megatron's training makes it.

    Args:
        settings: an OptimizerConfig.
        chunks: DDP-wrapped model chunks.
    """
    if find_spec("megatron.core.optimizer.emerging_optimizers"):  # 0.18 and later
        return import_module("megatron.core.optimizer").get_megatron_optimizer(settings, chunks)
    layer_wise = settings.optimizer.startswith("dist_")
    return _muon().get_megatron_muon_optimizer(settings, chunks, layer_wise_distributed_optimizer=layer_wise)


def _muon() -> Any:
    """Megatron's module of 0.16 and 0.17; that of 0.16 is made to use the new names."""
    if _MUON in sys.modules or hasattr(import_module("megatron.core.optimizer"), "HAVE_EO_V02"):
        return import_module(_MUON)
    package: Any = import_module("emerging_optimizers.orthogonalized_optimizers")
    base: Any = package.OrthogonalizedOptimizer
    newton_schulz = package.muon_utils.newton_schulz_tp

    class OrthogonalizedOptimizer(base):  # type: ignore[misc]
        def __init__(self, params: Any, lr: float, momentum_beta: float, *, use_nesterov: bool, **kwargs: Any) -> None:
            super().__init__(params, lr, momentum_beta, nesterov=use_nesterov, **kwargs)

    def newton_schulz_tp(*args: Any, mode: str, **kwargs: Any) -> Any:
        return newton_schulz(*args, tp_mode=mode, **kwargs)

    with (
        mock.patch.object(package, "OrthogonalizedOptimizer", OrthogonalizedOptimizer),
        mock.patch.object(package.muon_utils, "newton_schulz_tp", newton_schulz_tp),
    ):
        return import_module(_MUON)
