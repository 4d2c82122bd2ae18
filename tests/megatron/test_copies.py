"""Copies and pickles of a router keep every bit and type, and the copy is protected as the router was.

Where upstream's own router cannot be copied (routers from 0.13 on hold process groups, configs before that local
functions) ours cannot either, for the same reason; without what stands in the way, it can.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch

import megatron_fp32_router

# What is asked here is alike on the lines in between.
pytestmark = pytest.mark.on_lines("0.11", "0.13", "0.19")


def through_torch_save(router: Any) -> Any:
    file = io.BytesIO()
    torch.save(router, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda router: pickle.loads(pickle.dumps(router)),
    "torch.save": through_torch_save,
}


def fill(router: Any) -> None:
    """Give every tensor bits that no lower precision holds."""
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.copy_(torch.rand(tensor.shape, dtype=torch.float64) * 7 + 2**-20)


def without_obstacles(router: Any) -> Any:
    """`router` without process groups, and with initialisers that are named functions."""
    for name, value in list(vars(router).items()):
        if isinstance(value, torch.distributed.ProcessGroup):
            setattr(router, name, None)
    for name, value in list(vars(router.config).items()):
        if callable(value) and not isinstance(value, type):
            setattr(router.config, name, torch.nn.init.normal_)
    return router


def outcome(way: Any, router: Any) -> str:
    try:
        way(router)
    except Exception as error:
        return type(error).__name__
    return "a copy"


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_router_can_be_copied_as_upstreams_own_can(way: Any, router: Any) -> None:
    upstream = outcome(way, router())
    megatron_fp32_router.enable()
    try:
        assert outcome(way, router()) == upstream
    finally:
        megatron_fp32_router.disable()


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_copy_keeps_types_and_bits_and_is_protected(way: Any, router: Any, plugin: Any, with_bias: bool) -> None:
    built = without_obstacles(router(linear_bias=with_bias))
    built.bfloat16()
    fill(built)
    made = way(built)
    assert type(made) is type(built)
    for _ in range(2):
        for (name, tensor), (_, original) in zip(
            [*made.named_parameters(), *made.named_buffers()],
            [*built.named_parameters(), *built.named_buffers()],
            strict=True,
        ):
            assert tensor.dtype == original.dtype, name
            assert tensor.dtype.itemsize >= 4, name
            assert torch.equal(tensor, original), name
        made.bfloat16()  # and once more after a cast of the copy
    assert made.local_tokens_per_expert.dtype == torch.float64


def test_a_pickle_made_without_the_plugin_is_noticed_with_it(router: Any) -> None:
    pickled = pickle.dumps(without_obstacles(router().bfloat16()))
    megatron_fp32_router.enable()
    try:
        made = pickle.loads(pickled)
        with pytest.raises(megatron_fp32_router.UnprotectedRouterError):
            made(torch.randn(4, 1, made.config.hidden_size, dtype=torch.bfloat16))
    finally:
        megatron_fp32_router.disable()
