"""Megatron-FSDP, two ranks: a checkout's own training goes on from its checkpoints, with the plugin and without."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from going_on import HALF, assert_went_on, rounded
from pretrain import Program, Run, protected, trained
from saved import values

pytestmark = pytest.mark.since("0.16")

#: Gloo cannot scale while it reduces. And Megatron does not allow one connection here, which the other tests set.
FSDP = (
    *("--use-megatron-fsdp", "--use-distributed-optimizer", "--data-parallel-sharding-strategy", "optim_grads_params"),
    *("--ckpt-format", "fsdp_dtensor", "--no-gradient-reduce-div-fusion"),
)
CONNECTIONS = {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}


@pytest.fixture(scope="module")
def sharded(pretrain: Program) -> Run:
    """Two ranks with Megatron-FSDP and the plugin, which lets them from 0.16 on."""
    return pretrain("sharded", *FSDP, ranks=2, **CONNECTIONS)


def test_a_resume_ends_on_the_bits_of_a_run_that_never_stopped(pretrain: Program, sharded: Run) -> None:
    protected(sharded)
    again = pretrain("sharded-again", *FSDP, ranks=2, load=sharded.saved(HALF), **CONNECTIONS)
    assert_went_on(again, sharded, but=("num_floating_point_operations_so_far",))


@pytest.mark.whole
def test_it_goes_on_where_the_plugin_is_turned_on_or_off(pretrain: Program, sharded: Run) -> None:
    """Its checkpoints hold all main copies by name, in fp32. With the plugin a router's main copy is its weight."""
    off = pretrain("sharded-off", *FSDP, plugin=False, ranks=2, **CONNECTIONS)
    layouts = [{name: layout(value) for name, value in values(run.saved(HALF)).items()} for run in (off, sharded)]
    assert layouts[0] == layouts[1]
    on = pretrain("sharded-off-on", *FSDP, ranks=2, load=off.saved(HALF), **CONNECTIONS)
    trained(on)
    protected(on)
    before = saved_weights(off.saved(HALF))
    assert [rank["first"] for rank in on.ranks] == [before] * 2
    assert before != rounded(before)
    left = pretrain("sharded-on-off", *FSDP, plugin=False, ranks=2, load=sharded.saved(HALF), **CONNECTIONS)
    trained(left)
    before = saved_weights(sharded.saved(HALF))
    assert left.said == []
    assert [rank["first"] for rank in left.ranks] == [rounded(before)] * 2 != [before] * 2


def layout(value: Any) -> tuple[Any, ...]:
    return (value.dtype, value.shape) if isinstance(value, np.ndarray) else (type(value),)


def saved_weights(checkpoint: Path) -> list[Any]:
    """Each router's weight in a checkpoint of Megatron-FSDP."""
    found = values(checkpoint)
    return [found[name].astype(float).tolist() for name in sorted(found) if re.search(r"model.*router\.weight$", name)]
