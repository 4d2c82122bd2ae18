"""What every rank of tests/test_agreement.py runs."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch.distributed as dist

import megatron_fp32_router
from megatron_fp32_router import lab
from megatron_fp32_router.lab.groups import leave_layout
from megatron_fp32_router.lab.train import mean_over_ranks


def build(recipe: Any, dense_stage: bool) -> Any:
    """A model in training; with `dense_stage`, the first pipeline stage has no router."""
    specs = import_module("megatron.core.models.gpt.gpt_layer_specs")
    real = specs.get_gpt_layer_local_spec
    try:
        if dense_stage and dist.get_rank() == 0:
            specs.get_gpt_layer_local_spec = lambda **_: real(num_experts=None, moe_grouped_gemm=False)
        return lab.build(recipe)
    finally:
        specs.get_gpt_layer_local_spec = real


def train(recipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Build and take a step."""
    build(recipe, dense_stage=False).step(lab.text_batches(recipe, seed=1))
    return {}


def beside_others(recipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments["train"]` ranks, from rank `arguments["first"]` on, train; the job's others build no model.

    All call initialize_model_parallel, because making a group takes every rank; the others are in no group. With
    `handed`, Megatron's groups are handed to the model and DDP, and parallel_state knows none. At the end all of
    them train together.
    """
    leave_layout()
    state, size, first = import_module("megatron.core.parallel_state"), arguments["train"], arguments["first"]
    rank, real = dist.get_rank(), dist.get_world_size
    if "local_world_size" in inspect.signature(state.initialize_model_parallel).parameters:
        state.initialize_model_parallel(rank_offset=first, local_world_size=size)
    else:  # as patched copies of earlier releases do
        with mock.patch.object(dist, "get_world_size", lambda group=None: size if group is None else real(group)):
            state.initialize_model_parallel()
    gathered: list[Any] = [None] * dist.get_world_size()
    if rank not in range(first, first + size):
        # From 0.14 on get_megatron_optimizer gathers names of options from the whole job, a few times.
        while "built" not in gathered:
            dist.all_gather_object(gathered, [])
        mean_over_ranks([])  # the laboratory's step, likewise
    else:
        _train_alone(replace(recipe, data_parallel=size), gathered, handed=arguments.get("handed", False))
    leave_layout()
    with lab.layout(recipe):
        return train(recipe, {})


def _train_alone(recipe: Any, gathered: list[Any], handed: bool) -> None:
    lab.seed(recipe.seed)
    if handed:
        groups = import_module("megatron.core.process_groups_config").ProcessGroupCollection.use_mpu_process_groups()
        model = lab.build_model(recipe)[0]
        ddp = import_module("megatron.core.distributed")
        state = import_module("megatron.core.parallel_state")
        known = {name: None for name, value in vars(state).items() if isinstance(value, dist.ProcessGroup)}
        with mock.patch.multiple(state, **known):
            config = ddp.DistributedDataParallelConfig()
            ddp.DistributedDataParallel(model.config, config, model, pg_collection=groups).broadcast_params()
    room = lab.build(recipe)
    dist.all_gather_object(gathered, "built")
    room.step(lab.text_batches(recipe, seed=1))


def scenes(recipe: Any, arguments: dict[str, Any]) -> dict[str, str]:
    """One build after the other, each as the first of its job; returns what each was stopped by."""
    agreement = import_module("megatron_fp32_router.ranks.agreement")
    is_last = dist.get_rank() == dist.get_world_size() - 1
    outcome: dict[str, str] = {}

    def play(name: str, room: str | None = None) -> None:
        dist.barrier()
        agreement._Agreed.group = None
        agreement._ROOM = room or name
        print(f"--- {name}", flush=True)
        try:
            build(recipe, dense_stage=True).step(lab.text_batches(recipe, seed=1))
            outcome[name] = ""
        except megatron_fp32_router.RanksDisagreeError as error:
            outcome[name] = str(error)

    agreement._PATIENCE = 0.5
    play("all alike")
    outcome["left in the store"] = ", ".join(
        key
        for key in ("0", "1", "judge", "verdict/0", "verdict/1", "read")
        if dist.barrier() or dist.PrefixStore("all alike", dist.distributed_c10d._get_default_store()).check([key])
    )
    play("all alike, in the same store", room="all alike")
    built = build(recipe, dense_stage=True)  # a second model asks nobody

    def ask(name: str, question: Callable[[], Any]) -> None:
        dist.barrier()
        agreement._Agreed.group = None
        agreement._ROOM = name
        print(f"--- {name}", flush=True)
        question()

    finalize = import_module("megatron.core.distributed.finalize_model_grads")
    places = import_module("megatron_fp32_router.ranks.places")
    wrapping = places.publish_when_wrapping(lambda *_: None)
    ask("broadcast_params asks", built.chunks[0].broadcast_params)
    ask("the balance update asks", lambda: finalize._update_router_expert_bias(built.chunks, built.config))
    ask("user buffers ask", lambda: wrapping(None, None, SimpleNamespace(nccl_ub=True), built.chunks[0]))

    if is_last:
        os.environ["MEGATRON_FP32_ROUTER_LIKE"] = "vllm==0.33.0/deepseek_v3"
        os.environ["MEGATRON_FP32_ROUTER_PRODUCTS"] = "fp32"
        megatron_fp32_router.enable(protect="buffers")
    play("other settings")
    os.environ.pop("MEGATRON_FP32_ROUTER_LIKE", None)
    os.environ.pop("MEGATRON_FP32_ROUTER_PRODUCTS", None)
    megatron_fp32_router.enable(protect="all")

    version = agreement.__version__
    if is_last:
        agreement.__version__ = "99.0"
    play("other version")
    agreement.__version__ = version

    # A Megatron of the same version with another body of one function, and a monitor that looks on one rank only.
    core, settings = import_module("megatron.core"), agreement.registry.settings
    file = core.__file__
    if is_last:
        core.__file__ = arguments["fork"]
        agreement.registry.settings = replace(settings, monitor=5)
    play("other Megatron and monitor")
    core.__file__, agreement.registry.settings = file, settings

    # Rank 1 comes to its optimizer only when rank 0 has said that it is waiting for it.
    store = dist.distributed_c10d._get_default_store()
    say, agree = agreement.say, agreement._agree

    def say_and_note(*arguments: Any, **options: Any) -> None:
        say(*arguments, **options)
        store.set("rank 0 has said", arguments[1])

    def agree_late(room: Any) -> None:
        if is_last:
            store.wait(["rank 0 has said"])
        agree(room)

    agreement.say, agreement._agree = say_and_note, agree_late
    play("slow")
    agreement.say, agreement._agree = say, agree

    agreement.registry.settings = replace(agreement.registry.settings, agree_timeout=0)
    play("nobody compares")
    return outcome
