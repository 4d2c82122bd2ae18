"""What tests/megatron/test_optimizer_step.py runs: which operations the optimizer's step is made of."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
from programs import resume
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_fp32_router import lab
from megatron_fp32_router.lab import kernels

#: Operations that read a number from the device, and so wait for it.
WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "item", "equal")
COPIES = ("copy_", "_to_copy", "clone", "_foreach_copy_")


class Counting(TorchDispatchMode):
    """Counts operations by name, and of copies those that read or write bf16. A kernel's insides are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.copied = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _in_a_kernel():
            name = func.overloadpacket.__name__
            self.operations[name] += 1
            leaves = torch.utils._pytree.tree_leaves((args, result))
            if name in COPIES and any(getattr(leaf, "dtype", None) == torch.bfloat16 for leaf in leaves):
                self.copied += max(leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor))
        return result


def _in_a_kernel() -> bool:
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename != kernels.__file__:
        frame = frame.f_back
    return frame is not None


def count(recipe: Any, arguments: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """ "CASE on" and "CASE off" -> the operations of its third step, and how many numbers are copied from or to bf16.

    Waits are those operations that read a number from the device.
    """
    lab.leave_layout()
    found = {}
    for case in arguments["cases"]:
        for plugin in ("off", "on"):
            resume.turn(plugin)
            recipe = resume.recipe_of(case)
            with lab.layout(recipe), resume.engine(case):
                room = resume.build(recipe)
                batches = lab.text_batches(recipe, seed=7)
                for _ in range(2):
                    room.step(batches)
                room.step_without_optimizer(batches)
                with Counting() as counting:
                    room.optimizer.step()
            waits = sum(counting.operations[name] for name in WAITS)
            operations = dict(counting.operations)
            found[f"{case['name']} {plugin}"] = {"operations": operations, "waits": waits, "copied": counting.copied}
    resume.turn("on")
    return found
