"""What a whole training program, a checkout's pretrain_gpt.py, asks of CUDA beside what cpu.py answers.

Only for a process that runs nothing else: the modules that Megatron compiles are replaced for good.
"""

from __future__ import annotations

import builtins
import sys
import types
import typing
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
import wrapt

from megatron_fp32_router.lab import compat, cpu, cpu_fsdp

if TYPE_CHECKING:
    import numpy as np


def pretend() -> None:
    """Answer what `megatron.training` and a training program ask. Call it before Megatron is imported.

    Raises:
        LabError: there is a CUDA device.
    """
    compat.before_import(None, training=True)
    cpu.pretend()
    cpu.replace(torch.cuda, "is_available", lambda: True)
    # A number: Megatron makes a torch.device("cuda", …) of it. cpu.py takes a bare number for CUDA's, too.
    cpu.replace(torch.cuda, "current_device", lambda: 0)
    cpu.replace(torch.cuda, "get_device_name", lambda device=None: "CPU")  # main
    # FSDP's flags are checked for a GPU newer than Hopper.
    cpu.replace(torch.cuda, "get_device_properties", lambda device=None: types.SimpleNamespace(major=9, minor=0))
    # In a torch that was built for CUDA, pinning asks the driver.
    cpu.replace(torch.Tensor, "pin_memory", lambda tensor, device=None: tensor)
    if not hasattr(typing, "override"):
        cpu.replace(typing, "override", lambda function: function)  # 0.19, on a Python before 3.12
    # 0.13 to 0.16 use the name without defining it where there is no TransformerEngine; globals come before builtins.
    cpu.replace(builtins, "te_general_gemm", None)
    _compiled("megatron.core.datasets.helpers_cpp", build_sample_idx_int32=_samples, build_sample_idx_int64=_samples)
    # The Adam that Megatron trains with on a GPU keeps `step` elsewhere than torch's, and checkpoints depend on it.
    # There is only this module, and no package apex: Megatron looks for other parts of apex by `import apex`.
    _compiled("apex.optimizers", FusedAdam=compat.FusedAdamLike, FusedSGD=torch.optim.SGD)
    # 0.11 and 0.12
    filesystem = import_module("torch.distributed.checkpoint.filesystem")
    cpu.replace(filesystem, "_write_item", compat.write_item_of_any_time())
    # 0.12 to 0.15 expect a TransformerEngine where they load a checkpoint or have a distributed optimizer.
    wrapt.register_post_import_hook(lambda module: compat.version_of_nothing(), "megatron.core.utils")
    wrapt.register_post_import_hook(lambda module: compat.empty_fp8_list(), "megatron.core.fp8_utils")
    wrapt.register_post_import_hook(cpu_fsdp.collectives_one_by_one, cpu_fsdp.BUFFERS)
    # Up to 0.16; it compiles nothing any more, and only asks nvcc for its version.
    _compiled("megatron.legacy.fused_kernels", load=lambda args: None)


def _compiled(name: str, **members: Any) -> None:
    """Stand in for a module that Megatron compiles, so that no machine needs a compiler to train here."""
    module = types.ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module


def _samples(
    sizes: np.ndarray,
    documents: np.ndarray,
    length: int,
    epochs: int,
    tokens_per_epoch: int,
    drop_last: bool = True,
    extra: int = 1,
) -> np.ndarray:
    """Where samples begin: index into `documents` and offset in that document, for each sample and for their end."""
    import numpy as np

    count = (epochs * tokens_per_epoch - extra) // length
    ends = np.cumsum(sizes[documents], dtype=np.int64)
    starts = np.arange(count + 1, dtype=np.int64) * length
    document = np.searchsorted(ends, starts, side="right")
    offset = starts - (ends - sizes[documents])[document]
    return np.stack([document, offset], axis=1).astype(np.int32)
