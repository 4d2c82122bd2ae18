"""What fp32 router parameters do not work with is refused before the first step, and PROTECT=buffers is not."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
from packaging.version import Version

import megatron_fp32_router
from megatron_fp32_router import lab
from megatron_fp32_router.lab import compat, cpu_fsdp
from megatron_fp32_router.lab import train as lab_train

Refused = megatron_fp32_router.CombinationRefusedError
WAY_OUT = "MEGATRON_FP32_ROUTER_PROTECT=buffers"
SMALL = {"overlap": False, "seq_length": 16, "micro_batches": 1}


@contextlib.contextmanager
def refused(found: str, instead: str, *, untested: bool = False) -> Iterator[None]:
    """The error says what was found, what to change, and both variables where both help."""
    with pytest.raises(Refused) as caught:
        yield
    message = str(caught.value)
    assert found in message
    assert instead in message
    assert "fp32 router parameters beside bfloat16 ones" in message
    assert WAY_OUT in message
    assert ("MEGATRON_FP32_ROUTER_UNTESTED=allow" in message) == untested


# Wrappers --------------------------------------------------------------------------------------------------------


def wrapped(recipe: lab.Recipe) -> Any:
    (model,) = lab.build_model(recipe)
    return import_module("megatron.core.transformer.module").Float16Module(model.config, model)


def test_torch_fsdp2_is_refused_where_torch_keeps_it_private(plugin: Any, monkeypatch: Any) -> None:
    wrapper = import_module("megatron.core.distributed.torch_fully_sharded_data_parallel").TorchFullyShardedDataParallel
    monkeypatch.delattr(torch.distributed.fsdp, "FSDPModule")
    recipe = lab.Recipe(**SMALL, wrapper="fsdp2")
    ddp = import_module("megatron.core.distributed").DistributedDataParallelConfig()

    def wrap() -> Any:
        module = wrapped(recipe)
        extra = compat.signature_kwargs(wrapper.__init__, ddp_config=ddp, sub_modules_to_wrap=[])
        return wrapper(module.config, module=module, **extra)

    plugin()
    with lab.parallel(recipe), refused("torch FSDP2", "torch 2.6 or later"):
        wrap()
    plugin(protect="buffers")
    with lab.parallel(recipe):
        assert wrap()


@pytest.mark.on_lines("0.12", "0.13", "0.14", "0.15", "0.20")
def test_megatron_fsdp_is_refused_where_it_could_not_be_resumed(
    plugin: Any, release: Version, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setattr("megatron_fp32_router.log._said", set())
    caplog.set_level(logging.WARNING)
    if release < Version("0.14"):
        home = import_module("megatron.core.distributed.custom_fsdp.fully_sharded_data_parallel")
    else:
        home = import_module("megatron.core.distributed.fsdp.mcore_fsdp_adapter")
    wrapper = getattr(home, "FullyShardedDataParallelV2", home.FullyShardedDataParallel)
    recipe = lab.Recipe(**SMALL)
    for protect, untested in (("all", "refuse"), ("all", "allow"), ("buffers", "refuse")):
        monkeypatch.setenv("MEGATRON_FP32_ROUTER_UNTESTED", untested)
        plugin(protect=protect)
        with lab.parallel(recipe):
            module = wrapped(recipe)
            if (protect, untested) == ("all", "refuse"):
                with refused("Megatron-FSDP", "Train without it", untested=True):
                    wrapper(module.config, object(), module)
            else:
                # Whatever it lacks on a CPU, or in that object: upstream's own code was reached.
                with pytest.raises(Exception) as caught:  # noqa: PT011
                    wrapper(module.config, object(), module)
                assert not isinstance(caught.value, megatron_fp32_router.Fp32RouterError)
    assert "Allowed by MEGATRON_FP32_ROUTER_UNTESTED=allow" in caplog.text


@pytest.mark.on_lines("0.17", "0.18", "0.19", "0.20")
def test_main_copies_below_fp32_are_refused_in_megatron_fsdp(plugin: Any) -> None:
    recipe = lab.Recipe(
        **SMALL,
        wrapper="megatron_fsdp",
        optimizer="distributed",
        ddp_extra={"megatron_fsdp_main_params_dtype": torch.bfloat16},
    )
    with cpu_fsdp.megatron_fsdp(), lab.parallel(recipe):
        with refused("Megatron-FSDP's main copies in bfloat16", "Set --megatron-fsdp-main-params-dtype to fp32"):
            lab.build(recipe)
        plugin(protect="buffers")
        assert lab.build(recipe)


# Data parallelism ------------------------------------------------------------------------------------------------


@pytest.fixture
def later_chunk(build: Any, monkeypatch: Any) -> Any:
    """`later_chunk(**recipe)`: a model that data parallelism takes for a later chunk of a virtual pipeline."""
    wrap = lab_train._wrap
    monkeypatch.setattr(lab_train, "_wrap", lambda recipe, config, model, index: wrap(recipe, config, model, 1))
    return lambda **fields: build(ddp_extra={"grad_reduce_in_fp32": False}, **SMALL, **fields)


def dtypes_together(room: lab.Lab) -> list[set[torch.dtype]]:
    chunk = room.chunks[0]
    return [
        {bucket.grad_data.dtype for bucket in group.buckets}
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups
    ]


def test_upstream_reduces_two_dtypes_in_one_all_reduce(later_chunk: Any, plugin: Any, monkeypatch: Any) -> None:
    home = import_module("megatron.core.distributed.distributed_data_parallel")
    monkeypatch.setattr(home, "partition_buckets", home.partition_buckets.__wrapped__)
    room = later_chunk()
    with pytest.raises(RuntimeError, match="same type"):
        room.step(lab.text_batches(room.recipe, seed=1))


def test_gradients_of_two_dtypes_are_reduced_apart(later_chunk: Any, plugin: Any) -> None:
    room = later_chunk()
    assert dtypes_together(room) == [{torch.bfloat16}, {torch.float32}]
    before = {name: router.weight.detach().clone() for name, router in room.routers()}
    room.step(lab.text_batches(room.recipe, seed=1))
    assert all(not torch.equal(before[name], router.weight) for name, router in room.routers())
