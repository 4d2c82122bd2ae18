"""CUDA graphs: what runs in a step neither waits for the device nor has shapes that depend on data.

Watched on the CPU, operator by operator: the same operators would break a capture on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import megatron_fp32_router

# What is asked here is alike on the lines in between.
pytestmark = pytest.mark.on_lines("0.11", "0.15", "0.19")

#: Operators whose result goes to the host, or has a shape that only the data tell.
UNSAFE = (
    "_local_scalar_dense",
    "_unique",
    "bincount",
    "equal",
    "histc",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "unique",
)


#: Ways to the host that no operator shows where the tensor lies there already.
TO_THE_HOST = ("cpu", "numpy", "tolist", "__array__")


class Watch(TorchDispatchMode):
    """Counts the operators that a graph could not capture, and keeps every operator's name."""

    def __init__(self) -> None:
        super().__init__()
        self.unsafe: Counter[str] = Counter()
        self.seen: list[str] = []
        self._methods = pytest.MonkeyPatch()

    def __enter__(self) -> Watch:
        for name in TO_THE_HOST:
            self._methods.setattr(torch.Tensor, name, self._noting(name, getattr(torch.Tensor, name)))
        move = torch.Tensor.to

        def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if any(str(given) == "cpu" for given in (*args, *kwargs.values())):
                self.unsafe["to('cpu')"] += 1
            return move(tensor, *args, **kwargs)

        self._methods.setattr(torch.Tensor, "to", to)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._methods.undo()

    def _noting(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.unsafe[name] += 1
            return method(*args, **kwargs)

        return noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.seen.append(name)
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if name.startswith(UNSAFE):
            self.unsafe[name] += 1
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index.dtype in (torch.bool, torch.uint8) for index in tree_leaves(args[1]) if index is not None
        ):
            self.unsafe[f"{name} with a mask"] += 1
        if name == "repeat_interleave" and len(given) > 0 and "output_size" not in (kwargs or {}):
            self.unsafe[name] += 1
        if len({tensor.device for tensor in (*given, *made)}) > 1:
            self.unsafe[f"{name} between devices"] += 1
        return result


@pytest.mark.parametrize(
    "unsafe",
    [
        lambda x: bool(x.any()),
        lambda x: float(x.sum()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_fill_(x > 0, 1.0).unique(),
        lambda x: x.to("meta"),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.to("cpu", non_blocking=True),
    ],
    ids=["bool()", "float()", "nonzero", "mask", "unique", "device", "tolist", "cpu", "numpy", "to the CPU"],
)
def test_the_watch_sees_what_a_graph_cannot_capture(unsafe: Callable[[torch.Tensor], Any]) -> None:
    with Watch() as watch:
        unsafe(torch.ones(3))
    assert watch.unsafe


def wrapped(router: Any, **fields: Any) -> Any:
    built = router(**fields)
    return import_module("megatron.core.transformer.module").Float16Module(built.config, built).module


def cases(release: Any) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {"plain": {}, "auxiliary loss": {"load_balancing": "aux_loss"}}
    if release.minor >= 12:
        found["moe_router_dtype"] = {"router_dtype": "fp32"}
    if release.minor >= 15:
        found["bias and global auxiliary loss"] = {"linear_bias": True, "load_balancing": "global_aux_loss"}
    return found


def step(built: Any) -> Watch:
    """Gating, choice of experts, counting and backward of one micro-batch."""
    hidden = torch.randn(16, 2, built.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    with Watch() as watch:
        probs, _ = built(hidden)
        probs.sum().backward()
    return watch


def test_forward_and_backward_add_nothing_that_a_graph_could_not_capture(router: Any, release: Any) -> None:
    for case, fields in cases(release).items():
        upstream = step(wrapped(router, **fields))
        megatron_fp32_router.enable()
        try:
            ours = step(wrapped(router, **fields))
        finally:
            megatron_fp32_router.disable()
        assert sum(name in ("mm", "addmm") for name in ours.seen) == 3, case  # forward, and both gradients
        assert not ours.unsafe - upstream.unsafe, case


@pytest.mark.since("0.16")
def test_counting_under_a_padding_mask_is_safe(router: Any, plugin: Any) -> None:
    built = wrapped(router)
    with Watch() as watch:
        built._apply_expert_bias(torch.ones(6, 8, dtype=torch.bool), padding_mask=torch.arange(6) > 3)
    assert watch.seen
    assert not watch.unsafe


def test_the_balance_update_and_the_reset_hold_nothing_that_a_graph_could_not_capture(
    router: Any, release: Any, plugin: Any
) -> None:
    finalize = import_module("megatron.core.distributed.finalize_model_grads")
    for fields in cases(release).values():
        built = wrapped(router, **fields)
        built.local_tokens_per_expert.copy_(torch.arange(8))
        with Watch() as watch:
            finalize._update_router_expert_bias([built], built.config)
            if release.minor >= 15:
                finalize.reset_model_temporary_tensors(built.config, [built])
        assert built.expert_bias.any()
        assert not built.local_tokens_per_expert.any()
        assert any("allreduce" in name for name in watch.seen)
        assert not watch.unsafe
