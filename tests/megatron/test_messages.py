"""What is said of a router tensor below fp32: whose it is, what has changed it where that is known, and what to do.

Each error names the router by its name in the model, its layer, its pipeline stage and the rank.
"""

from __future__ import annotations

import gc
import logging
import sys
import weakref
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_fp32_router
from megatron_fp32_router import lab
from megatron_fp32_router.casts import below
from megatron_fp32_router.casts.router import COUNTER, wrapped
from megatron_fp32_router.patching.registry import registry

# What is asked here is alike on the lines in between.
pytestmark = pytest.mark.on_lines("0.11", "0.14", "0.19")

SMALL = {"seq_length": 16, "micro_batches": 1, "layers": 2}


def named(layer: int) -> str:
    return f"decoder.layers.{layer - 1}.mlp.router (layer {layer}, pipeline stage 0 (the first is 0), rank 0)"


def raised(action: Callable[[], Any]) -> str:
    with pytest.raises(megatron_fp32_router.UnprotectedRouterError) as caught:
        action()
    return str(caught.value)


def second(room: lab.Lab) -> Any:
    return [router for _, router in room.routers()][1]


def step(room: lab.Lab) -> Callable[[], Any]:
    return lambda: room.step(lab.text_batches(room.recipe, seed=1))


def assign_a_state(router: Any) -> None:
    router.load_state_dict({name: tensor.bfloat16() for name, tensor in router.state_dict().items()}, assign=True)


def swap_data(router: Any) -> None:
    router.weight.data = router.weight.data.bfloat16()


def put_another_there(router: Any) -> None:
    router.weight = torch.nn.Parameter(router.weight.detach().bfloat16())


def cast_around_the_plugin(router: Any) -> None:
    torch.nn.Module._apply(router, lambda tensor: tensor.bfloat16())


ASSIGNED = "load_state_dict(assign=True) with a torch.bfloat16 state does that: load without assign"
OTHER = "It was fp32 when the model was wrapped, and another tensor is in its place now."
SAME = (
    "It was fp32 when the model was wrapped, and is the same tensor object still: something has assigned to its .data"
)
BEFORE = "Either the model was built or cast before megatron_fp32_router was active"

CAUSES: dict[str, tuple[Callable[[Any], None], str, tuple[str, ...]]] = {
    "load_state_dict(assign=True)": (assign_a_state, "expert_bias", (OTHER, ASSIGNED)),
    "another parameter": (put_another_there, "weight", (OTHER, ASSIGNED)),
    ".data": (swap_data, "weight", (SAME,)),
    "a cast of a buffer": (cast_around_the_plugin, "expert_bias", (OTHER, "a cast that goes around the plugin")),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_the_forward_names_the_router_and_what_has_changed_it(
    cause: str, build: Any, expert_layers: Any, plugin: Any
) -> None:
    change, tensor, said = CAUSES[cause]
    room = build(**SMALL)
    change(second(room))
    message = raised(step(room))
    whose = named(expert_layers[1])
    assert f"router tensor {tensor!r} is torch.bfloat16 at the forward, and should be fp32: {whose}" in message
    for part in (*said, "MEGATRON_FP32_ROUTER_ON_MISMATCH=warn"):
        assert part in message
    assert all(other not in message for other in {OTHER, SAME, BEFORE} - set(said))


@pytest.mark.parametrize("name", ["expert_bias", COUNTER])
def test_the_update_names_the_router_and_what_has_changed_it(
    name: str, build: Any, expert_layers: Any, plugin: Any
) -> None:
    room = build(**SMALL)
    setattr(second(room), name, getattr(second(room), name).bfloat16())
    finalize = import_module("megatron.core.distributed.finalize_model_grads")
    message = raised(lambda: finalize._update_router_expert_bias(room.chunks, room.config))
    whose = named(expert_layers[1])
    assert f"router tensor {name!r} is torch.bfloat16 at the balance update, and should be fp32: {whose}" in message
    assert OTHER in message


def test_the_rule_names_the_router_whose_bias_it_was_handed(build: Any, expert_layers: Any, plugin: Any) -> None:
    room = build(**SMALL)
    rule = import_module("megatron.core.transformer.moe.moe_utils").get_updated_expert_bias
    counts, bias = second(room).local_tokens_per_expert, second(room).expert_bias
    message = raised(lambda: rule(counts, bias.bfloat16(), 1e-3))
    assert "expert_bias is torch.bfloat16 at the balance update (rank 0)" in message
    assert "No model that the plugin saw wrapped has such a tensor now" in message
    second(room).expert_bias = bias.bfloat16()
    message = raised(lambda: rule(counts, second(room).expert_bias, 1e-3))
    assert named(expert_layers[1]) in message
    assert OTHER in message


def test_a_router_that_was_not_seen_is_named_by_its_layer(build: Any, expert_layers: Any) -> None:
    room = build(**SMALL)
    megatron_fp32_router.enable()
    try:
        message = raised(step(room))
        assert f": a TopKRouter (layer {expert_layers[0]}, pipeline stage 0 (the first is 0), rank 0)" in message
        assert BEFORE in message
        assert "load_state_dict(assign=True) has put a torch.bfloat16 tensor of the state there" in message
    finally:
        megatron_fp32_router.disable()


def test_wrapping_names_layers_and_the_state_that_was_assigned_before(plugin: Any) -> None:
    recipe = lab.Recipe(**SMALL)
    with lab.parallel(recipe):
        (model,) = lab.build_model(recipe)
        state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items() if tensor is not None}
        model.load_state_dict(state, strict=False, assign=True)
        wrapper = import_module("megatron.core.transformer.module").Float16Module
        message = raised(lambda: wrapper(model.config, model))
        assert (
            "decoder.layers.0.mlp.router.weight (torch.bfloat16; layer 1, pipeline stage 0 (the first is 0)" in message
        )
        assert "load_state_dict(assign=True) has put a state's tensors there" in message


def test_the_layer_the_pipeline_stage_and_the_rank_are_those_of_the_process(request: pytest.FixtureRequest) -> None:
    recipe = lab.Recipe(pipeline_parallel=2, **SMALL)
    tree, programs = request.config.getoption("--megatron"), Path(__file__).parents[1] / "programs"
    assert lab.run_ranks("places:say", recipe, megatron=tree, plugin=True, python_path=[programs]) == [
        ["layer 1, pipeline stage 0 (the first is 0), rank 0"],
        ["layer 2, pipeline stage 1 (the first is 0), rank 1"],
    ]


def test_under_warn_one_router_speaks_for_all_and_the_training_goes_on(
    build: Any, expert_layers: Any, plugin: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(below, "_warned", set())
    room = build(**SMALL)
    plugin(on_mismatch="warn")
    for _, router in room.routers():
        router.expert_bias = router.expert_bias.bfloat16()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            for _, router in room.routers():
                router(torch.randn(4, 1, 64).bfloat16())
    (warning,) = [record.message for record in caplog.records if "router tensor" in record.message]
    assert named(expert_layers[0]) in warning
    assert "names one router only" in warning


def test_a_healthy_training_works_nothing_out(build: Any, plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    room = build(**SMALL)
    step(room)()

    def no_name(*_: Any) -> str:
        raise AssertionError("worked out")

    for name in ("place", "refuse", "refuse_handed", "_whose", "_cause"):
        monkeypatch.setattr(below, name, no_name)
    files: set[str] = set()
    sys.setprofile(lambda frame, *_: files.add(frame.f_code.co_filename))
    try:
        step(room)()
    finally:
        sys.setprofile(None)
    assert any(file.endswith("gating/logits.py") for file in files)
    assert below.__file__ not in files


def test_a_model_that_was_seen_can_be_let_go_and_so_can_its_tensors(plugin: Any) -> None:
    recipe = lab.Recipe(**SMALL)
    with lab.parallel(recipe):
        (model,) = lab.build_model(recipe)
        import_module("megatron.core.transformer.module").Float16Module(model.config, model)
        router = weakref.ref(model.decoder.layers[0].mlp.router)
        assert router() in wrapped
        assert model in registry.models  # also without DDP: what has changed is refused where it is used
        replaced = weakref.ref(model.decoder.layers[0].mlp.router.expert_bias)
        model.decoder.layers[0].mlp.router.expert_bias = torch.zeros(recipe.experts)
        assert replaced() is None
        del model
        gc.collect()
        assert router() is None
