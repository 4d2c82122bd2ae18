"""Casts: router tensors come through everything that reaches Module._apply with every bit they had."""

from __future__ import annotations

import copy
import io
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import megatron_fp32_router
from megatron_fp32_router.casts.router import is_protected

# What is asked here is alike on the lines in between.
pytestmark = pytest.mark.on_lines("0.11", "0.12", "0.13", "0.17", "0.19")

CASTS = {
    "bfloat16()": lambda m: m.bfloat16(),
    "half()": lambda m: m.half(),
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "to(dtype=float16)": lambda m: m.to(dtype=torch.float16),
    "to(device, dtype)": lambda m: m.to("cpu", torch.bfloat16),
    "to(tensor)": lambda m: m.to(torch.zeros(1, dtype=torch.bfloat16)),
    "type(bfloat16)": lambda m: m.type(torch.bfloat16),
    "float()": lambda m: m.float(),
    "share_memory()": lambda m: m.share_memory(),
    "double().bfloat16()": lambda m: m.double().bfloat16(),
    "keep_in_fp32 lambda": lambda m: m._apply(lambda t: t.to(torch.bfloat16) if t.is_floating_point() else t),
}


def fill(router: Any) -> dict[str, torch.Tensor]:
    """Give every tensor bits that no lower precision holds, and remember them."""
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.copy_(torch.rand(tensor.shape, dtype=torch.float64) * 7 + 2**-20)
    return {name: tensor.detach().clone() for name, tensor in (*router.named_parameters(), *router.named_buffers())}


def assert_kept(router: Any, before: dict[str, torch.Tensor]) -> None:
    for name, tensor in (*router.named_parameters(), *router.named_buffers()):
        assert tensor.dtype.itemsize >= 4, name
        assert torch.equal(tensor.detach().double(), before[name].double()), name


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_no_cast_reaches_the_router(cast: Any, router: Any, plugin: Any, with_bias: bool) -> None:
    built = router(linear_bias=with_bias)
    before = fill(built)
    weight, address = built.weight, built.weight.data_ptr()
    built.weight.sequence_parallel = "kept"
    built.weight.grad = torch.full_like(built.weight, 1 + 2**-20)
    cast(built)
    assert_kept(built, before)
    assert built.weight is weight
    assert built.weight.sequence_parallel == "kept"
    assert built.weight.grad.dtype == built.weight.dtype
    assert bool((built.weight.grad.double() == 1 + 2**-20).all())
    if cast is not CASTS["double().bfloat16()"] and cast is not CASTS["share_memory()"]:
        assert built.weight.data_ptr() == address


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_after_a_cast_optimizers_see_which_parameters_stay_fp32(
    cast: Any, router: Any, plugin: Any, with_bias: bool
) -> None:
    built = router(linear_bias=with_bias)
    cast(built)
    assert all(map(is_protected, built.parameters()))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sequence=st.lists(st.sampled_from(sorted(CASTS)), min_size=1, max_size=5))
def test_no_sequence_of_casts_reaches_the_router(
    sequence: list[str], router: Any, plugin: Any, with_bias: bool
) -> None:
    built = router(linear_bias=with_bias)
    before = fill(built)
    for name in sequence:
        CASTS[name](built)
    assert_kept(built, before)


@pytest.mark.parametrize("switch", ["overwrite_module_params_on_conversion", "swap_module_params_on_conversion"])
def test_both_conversion_switches_of_torch_keep_bits_and_attributes(switch: str, router: Any, plugin: Any) -> None:
    built = router()
    before = fill(built)
    built.weight.sequence_parallel = "kept"
    setter = getattr(torch.__future__, f"set_{switch}")
    setter(True)
    try:
        built.bfloat16()
    finally:
        setter(False)
    assert_kept(built, before)
    assert built.weight.sequence_parallel == "kept"


def test_what_comes_off_the_meta_device_is_zero_and_reset_gives_an_fp32_weight(router: Any, plugin: Any) -> None:
    built = router()
    built.weight.sequence_parallel = "kept"
    built.to("meta").to_empty(device="cpu")
    assert not built.expert_bias.any()
    assert not built.local_tokens_per_expert.any()
    assert built.weight.sequence_parallel == "kept"
    if hasattr(built, "reset_parameters"):
        built.reset_parameters()
        assert built.weight.dtype == torch.float32
        assert not torch.equal(built.weight, built.weight.bfloat16().float())


def test_copies_and_saved_states_of_a_router_keep_their_bits(router: Any, plugin: Any, release: Any) -> None:
    built = router()
    before = fill(built)
    if release.minor < 13:
        # Later routers hold process groups, which nothing can copy, with or without the plugin.
        assert_kept(copy.deepcopy(built).bfloat16(), before)
    file = io.BytesIO()
    torch.save(built.state_dict(), file)
    file.seek(0)
    other = router().bfloat16()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.weight, before["weight"])


def test_buffers_mode_leaves_the_parameters_to_upstream(router: Any, plugin: Any, with_bias: bool) -> None:
    plugin(protect="buffers")
    built = router(linear_bias=with_bias).bfloat16()
    assert {p.dtype for p in built.parameters()} == {torch.bfloat16}
    assert built.expert_bias.dtype == torch.float32
    assert built.local_tokens_per_expert.dtype == torch.float64
    # The look after wrapping has nothing against it.
    import_module("megatron.core.transformer.module").Float16Module(built.config, built)


def test_the_config_is_neither_changed_nor_replaced(router: Any, plugin: Any) -> None:
    from megatron_fp32_router import lab

    config = router().config
    built = lab.make_router(config)
    assert built.config is config
    assert config.params_dtype == torch.bfloat16
    assert built.weight.dtype == torch.float32


def test_everything_else_of_the_model_is_cast_as_before(build: Any, plugin: Any) -> None:
    room = build()
    routers = {id(p) for _, r in room.routers() for p in r.parameters()}
    assert {p.dtype for chunk in room.chunks for p in chunk.parameters() if id(p) not in routers} == {torch.bfloat16}


def test_a_model_built_before_activation_is_noticed_and_can_be_protected(build: Any, router: Any) -> None:
    built = router()
    config = built.config
    from megatron.core.transformer.module import Float16Module

    megatron_fp32_router.enable()
    try:
        # What has lost its bits is not made to look as if it had not.
        assert built.half().weight.dtype == torch.float16
        built.bfloat16()
        with pytest.raises(megatron_fp32_router.UnprotectedRouterError, match="before the plugin was active"):
            Float16Module(config, built)
        survey = megatron_fp32_router.protect_model(built)
        assert not survey.below
        assert built.weight.dtype == torch.float32
        # What refuses optimizers asks the parameter itself, without a second wrapping.
        assert is_protected(built.weight)
        Float16Module(config, built)
    finally:
        megatron_fp32_router.disable()


def test_a_model_of_which_a_part_is_under_ddp_is_refused_before_any_of_it_is_changed(router: Any) -> None:
    chunks = [router().bfloat16(), router().bfloat16()]
    chunks[1].weight.main_grad = torch.zeros_like(chunks[1].weight)
    megatron_fp32_router.enable()
    try:
        with pytest.raises(megatron_fp32_router.ModelInUseError):
            megatron_fp32_router.protect_model(chunks)
    finally:
        megatron_fp32_router.disable()
    assert [chunk.weight.dtype for chunk in chunks] == [torch.bfloat16] * 2


def test_the_first_forward_and_the_first_update_notice_a_model_wrapped_before_activation(build: Any) -> None:
    from megatron_fp32_router import lab

    room = build()
    megatron_fp32_router.enable()
    try:
        with pytest.raises(megatron_fp32_router.UnprotectedRouterError):
            room.step(lab.text_batches(room.recipe, seed=1))
        finalize = import_module("megatron.core.distributed.finalize_model_grads")
        with pytest.raises(megatron_fp32_router.UnprotectedRouterError, match="balance update"):
            finalize._update_router_expert_bias(room.chunks, room.config)
        with pytest.raises(megatron_fp32_router.ModelInUseError):
            megatron_fp32_router.protect_model(room.chunks)
    finally:
        megatron_fp32_router.disable()
