"""The balance update with its zeroing, all layers at once, on against upstream: time, and operations dispatched."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.pairs import Report, clock, compare
from benchmarks.training import turn

LAYERS = (1, 4, 16, 58, 128)
EXPERTS = (8, 64, 256, 512)


class Counting(TorchDispatchMode):
    """Counts operations, and the bytes that collectives move (what one rank hands in)."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        if func.namespace == "c10d":
            self.bytes += sum(t.nbytes for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor))
        return func(*args, **(kwargs or {}))


class Routers:
    """As many wrapped routers as a model has layers, and nothing else of a model."""

    def __init__(self, config: Any, layers: int) -> None:
        from megatron_fp32_router import lab

        wrap = import_module("megatron.core.transformer.module").Float16Module
        self.config = config
        self.routers = [lab.make_router(config) for _ in range(layers)]
        self.model = wrap(config, torch.nn.ModuleList(self.routers))
        random = torch.Generator().manual_seed(1)
        self.counts = torch.randint(0, 20000, (layers, config.num_moe_experts), generator=random).double()
        for router in self.routers:
            if hasattr(router, "_maintain_float32_expert_bias"):
                router._maintain_float32_expert_bias()  # as its first forward does

    def fill(self) -> None:
        """Counts as a step leaves them."""
        for router, counts in zip(self.routers, self.counts, strict=True):
            router.local_tokens_per_expert.copy_(counts)

    def update(self) -> None:
        """What Megatron does after the last backward of a step."""
        finalize = import_module("megatron.core.distributed.finalize_model_grads")
        finalize._update_router_expert_bias([self.model], self.config)
        reset = getattr(finalize, "reset_model_temporary_tensors", None)
        if reset is not None:
            reset(self.config, [self.model])

    def counted(self) -> Counting:
        """The operations of one update."""
        self.fill()
        with Counting() as counting:
            self.update()
        return counting


def measure(pairs: int, report: Report) -> list[dict[str, Any]]:
    """One row for each number of layers and experts."""
    from megatron_fp32_router import lab

    rows = []
    for experts in EXPERTS:
        recipe = lab.Recipe(hidden=8, heads=1, experts=experts)
        with lab.parallel(recipe):
            for layers in LAYERS:
                report(f"{layers} layers x {experts} experts")
                sides = {}
                for on in (False, True):
                    turn(on)
                    sides[on] = Routers(lab.make_config(recipe), layers)

                def update(on: bool) -> float:
                    turn(on)
                    sides[on].update()  # noqa: B023 - patching empties the interpreter's own caches
                    sides[on].fill()  # noqa: B023
                    return clock(sides[on].update)  # noqa: B023

                found = compare(lambda: update(False), lambda: update(True), pairs, warm_up=10)
                row: dict[str, Any] = {"layers": layers, "experts": experts, **found}
                for on in (False, True):
                    turn(on)
                    counting = sides[on].counted()
                    row["on" if on else "off"] = {"operations": counting.operations, "bytes": counting.bytes}
                rows.append(row)
        turn(False)
    return rows
