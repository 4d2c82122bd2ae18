"""Frozen parameters: checkpoints hold what upstream saves plus fp32 router weights, and nothing is refused in vain."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from programs import resume

import megatron_fp32_router
from megatron_fp32_router import lab
from megatron_fp32_router.lab import checkpoint, compat

RECIPE: dict[str, Any] = {**resume.TINY, "expert_bias": False, "overlap": False}
#: Of every layer: Megatron's checkpoints have one entry for a parameter of all layers.
FROZEN = ".self_attention.linear_proj.weight"
GATE = "decoder.final_layernorm.weight"
#: How Megatron tells a parameter group from others when it loads.
GROUP = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}


def trained(optimizer: torch.optim.Optimizer) -> list[Any]:
    """What `optimizer` updates, out of all it was handed. Main copies do not require gradients."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [parameter for parameter in parameters if not getattr(parameter, "frozen", False)]


def start(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Adam's state, as Megatron makes it before it loads one."""
    for parameter in trained(optimizer):
        if not optimizer.state[parameter]:
            optimizer.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
            optimizer.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
            optimizer.state[parameter]["step"] = torch.tensor(0.0)


def build(recipe: Any, *, gate: bool = False, only_routers: bool = False) -> Any:
    """A model whose optimizer was handed frozen parameters too, as frameworks with optimizers of their own do.

    gate: one parameter that is no router's stays in fp32 as well, and lies, as the frozen ones do, among the others.
    Otherwise the frozen ones are the last: releases to 0.19 save wrongly, or not at all, what comes after them.
    """
    room = resume.build(recipe)
    parameters = dict(room.chunks[0].module.module.named_parameters())
    if gate:
        parameters[GATE].data = parameters[GATE].data.float()
    for name, parameter in parameters.items():
        if name.endswith(FROZEN) or (only_routers and ".router." not in name):
            parameter.requires_grad_(False)
            parameter.frozen = True
    order = list(parameters.values())
    if not gate:
        order.sort(key=lambda parameter: not parameter.requires_grad)
    float16 = import_module("megatron.core.optimizer.optimizer").Float16OptimizerWithFloat16Params
    config = checkpoint.optimizers(room)[0].config
    room.optimizer = float16(torch.optim.AdamW([{"params": order, **GROUP}], lr=1e-3), config, None, start)
    for main in trained(room.optimizer.optimizer):
        main.grad = torch.full_like(main, 1e-2)
    room.optimizer.optimizer.step()
    with torch.no_grad():
        room.optimizer._copy_main_params_to_model_params()
    return room


def names(room: Any) -> dict[int, str]:
    return {id(parameter): name for name, parameter in room.chunks[0].module.module.named_parameters()}


def main_copies(room: Any) -> set[str]:
    """The parameters of which a distributed checkpoint of `room` has a main copy. Keys and tensors must agree."""
    model = dict(checkpoint._models(room))["model"].sharded_state_dict()
    keys = {id(entry.data): entry.key for entry in model.values() if hasattr(entry, "data")}
    state = room.optimizer.sharded_state_dict(model)
    copies = {id(main): parameter for parameter, main in checkpoint._main_copies(room.optimizer)}
    mains = [main for group in room.optimizer.optimizer.param_groups for main in group["params"]]
    owner = {id(main): copies.get(id(main), main) for main in mains}
    entries = [entry for group in state["fp32_from_fp16_params"] for entry in group]
    for entry in entries:
        assert entry.key == f"optimizer.state.fp32_param.{keys[id(owner[id(entry.data)])]}"
    states = {index: kinds for index, kinds in state["optimizer"]["state"].items() if index != "common_step"}
    assert {id(mains[index]) for index in states} == set(copies)
    for index, kinds in states.items():
        for kind, entry in kinds.items():
            assert entry.key == f"optimizer.state.{kind}.{keys[id(owner[id(mains[index])])]}"
            assert torch.equal(entry.data, room.optimizer.optimizer.state[mains[index]][kind])
    saved = [names(room)[id(owner[id(entry.data)])] for entry in entries]
    assert len(set(saved)) == len(saved)
    return set(saved)


@pytest.mark.parametrize("gate", [False, True])
def test_only_trained_parameters_that_are_bf16_without_the_plugin_get_a_main_copy(gate: bool, plugin: Any) -> None:
    with lab.parallel(lab.Recipe(**RECIPE)):
        room = build(lab.Recipe(**RECIPE), gate=gate)
        expected = {name for name in names(room).values() if not name.endswith(FROZEN)} - ({GATE} if gate else set())
        assert any(".router." in name for name in expected)
        assert main_copies(room) == expected
        legacy = [main for group in room.optimizer.state_dict()["fp32_from_fp16_params"] for main in group]
        owner = {id(main): names(room)[id(p)] for p, main in checkpoint._main_copies(room.optimizer)}
        assert {owner[id(main)] for main in legacy} == expected
        assert len(legacy) == len(expected)


def test_a_router_weight_that_megatron_itself_keeps_in_fp32_has_no_main_copy(plugin: Any) -> None:
    """As with the plugin off, on a Megatron that has the mark (#5929)."""
    with lab.parallel(lab.Recipe(**RECIPE)):
        room = build(lab.Recipe(**RECIPE), gate=True)
        marked, still_ours = [router.weight for _, router in room.routers()]
        assert names(room)[id(marked)] in main_copies(room)
        marked.keep_in_fp32 = True
        assert names(room)[id(still_ours)] in main_copies(room)
        assert names(room)[id(marked)] not in main_copies(room)


@pytest.mark.parametrize("only_routers", [False, True])
@pytest.mark.parametrize("directions", ["off on", "on off", "on on"])
def test_a_checkpoint_with_frozen_parameters_is_loaded_across_on_and_off(
    directions: str, only_routers: bool, tmp_path: Path
) -> None:
    before, after = directions.split()
    recipe = lab.Recipe(**RECIPE)
    with lab.parallel(recipe):
        for name in checkpoint.formats("plain"):
            resume.turn(before)
            room = build(recipe, only_routers=only_routers)
            checkpoint.save(room, tmp_path / name, name)
            saved = checkpoint.snapshot(room)
            resume.turn(after)
            other = build(recipe, only_routers=only_routers)
            disturb(other)
            checkpoint.load(other, tmp_path / name, name)
            found = checkpoint.snapshot(other)
            for key, value in found.items():
                router = key.endswith((".router.weight", ".router.bias"))
                expected = saved[f"{key}.main"].to(value.dtype) if router else saved[key]
                assert torch.equal(value, expected), f"{name}: {key}"
    resume.turn("off")


def disturb(room: Any) -> None:
    """So that what a load leaves alone shows."""
    with torch.no_grad():
        for _, main in checkpoint._main_copies(room.optimizer):
            main.add_(1.0)
        for parameter in room.chunks[0].module.module.parameters():
            parameter.zero_()


# Refusals: nothing is refused where no router is trained --------------------------------------------------------------


def unwrapped(recipe: Any, *, frozen: bool) -> Any:
    """A model in bf16, with or without its routers frozen."""
    (model,) = lab.build_model(recipe)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and ".router." in name))
    return import_module("megatron.core.transformer.module").Float16Module(model.config, model)


class ReachedError(Exception):
    """Upstream's own code was reached."""


@pytest.mark.on_lines("0.12", "0.13", "0.14", "0.15")
def test_a_wrapper_is_not_refused_where_no_router_is_trained(plugin: Any, release: Version, monkeypatch: Any) -> None:
    recipe = lab.Recipe(**RECIPE)
    home = "fsdp.mcore_fsdp_adapter" if release >= Version("0.14") else "custom_fsdp.fully_sharded_data_parallel"
    with lab.parallel(recipe):
        wrapper = import_module(f"megatron.core.distributed.{home}").FullyShardedDataParallel
        base = next(base for base in wrapper.__mro__ if base.__name__ == "_BaseDataParallel")
        monkeypatch.setattr(base, "__init__", lambda *args, **kwargs: (_ for _ in ()).throw(ReachedError))
        for frozen, error in ((False, megatron_fp32_router.CombinationRefusedError), (True, Exception)):
            module = unwrapped(recipe, frozen=frozen)
            with pytest.raises(error) as caught:
                wrapper(module.config, module=module, ddp_config=object())
            assert isinstance(caught.value, megatron_fp32_router.Fp32RouterError) != frozen


def test_torch_fsdp2_trains_around_frozen_routers(plugin: Any) -> None:
    """Torch wants one dtype of trained parameters only."""
    home = import_module("megatron.core.distributed.torch_fully_sharded_data_parallel")
    recipe = lab.Recipe(**RECIPE)
    with lab.parallel(recipe):
        module = unwrapped(recipe, frozen=True)
        wrapper = home.TorchFullyShardedDataParallel
        fields = compat.signature_kwargs(wrapper.__init__, ddp_config=object())
        wrapped = wrapper(module.config, module=module, sub_modules_to_wrap={home.TransformerLayer}, **fields)
        batch = next(lab.text_batches(recipe, seed=1))
        inputs = [batch[name] for name in ("tokens", "position_ids", "attention_mask")]
        wrapped(*inputs, labels=batch["labels"]).sum().backward()
        grads = {name: parameter.grad is not None for name, parameter in wrapped.named_parameters()}
        assert grads == {name: ".router." not in name for name in grads}
        assert {p.dtype for name, p in wrapped.named_parameters() if ".router." in name} == {torch.float32}


def frozen_routers(*, gate: bool = False, **fields: Any) -> Any:
    """A training with the distributed optimizer, three steps on, in which routers are frozen from the start.

    gate: parameters that are no router's stay in fp32.
    """
    recipe = lab.Recipe(**{**RECIPE, "optimizer": "distributed", "fused_adam": True, **fields})
    lab.seed(recipe.seed)
    models = lab.build_model(recipe)
    for name, parameter in models[0].named_parameters():
        parameter.requires_grad_(".router." not in name)
    if gate:
        norm = models[0].decoder.final_layernorm.float()
        norm._apply = lambda *args, **kwargs: norm
    room = lab.wrap(recipe, models)
    resume.train(room, 0)
    return room


def test_no_format_is_refused_across_on_and_off_where_no_router_is_trained(tmp_path: Path) -> None:
    def load(name: str, folder: Path) -> Any:
        room = frozen_routers()
        for main in [main for one in checkpoint.optimizers(room) for _, main in checkpoint._main_copies(one)]:
            main.data.zero_()
        checkpoint.load(room, folder, name)
        return checkpoint.snapshot(room)

    with lab.parallel(lab.Recipe(**RECIPE)):
        for name in checkpoint.formats("distributed"):
            resume.turn("off")
            room = frozen_routers()
            failure = resume.attempt(lambda name=name, room=room: checkpoint.save(room, tmp_path / name, name))
            if failure or resume.attempt(lambda name=name: load(name, tmp_path / name)):
                continue  # upstream cannot
            saved = checkpoint.snapshot(room)
            resume.turn("on")
            for key, value in load(name, tmp_path / name).items():
                assert torch.equal(value, saved[key].to(value.dtype)), f"{name}: {key}"
                assert (value.dtype == saved[key].dtype) != (".router." in key)
    resume.turn("off")


def test_padding_between_buckets_is_left_to_megatron_where_no_router_is_trained(plugin: Any, tmp_path: Path) -> None:
    name = "fully_reshardable"
    if name in checkpoint.formats("distributed"):
        with lab.parallel(lab.Recipe(**RECIPE)):
            padded = {"bucket_size": 3000, "pad_buckets_for_high_nccl_busbw": True}
            checkpoint.save(frozen_routers(overlap=True, ddp_extra=padded), tmp_path, name)


def test_an_optimizer_without_routers_is_saved_even_if_it_was_built_before_the_plugin_was_on() -> None:
    """Its numbering may be wrong (#2777), which is upstream's affair here."""
    with lab.parallel(lab.Recipe(**RECIPE)):
        resume.turn("off")
        room = frozen_routers(gate=True)
        resume.turn("on")
        for optimizer in checkpoint.optimizers(room):
            assert optimizer.get_parameter_state_dp_zero()
    resume.turn("off")
