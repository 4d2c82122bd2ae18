"""Refit between routers of different dtypes: the sender rounds to bf16, or widens to fp32; nothing else changes."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from packaging.version import Version

import megatron_fp32_router
from megatron_fp32_router import lab
from megatron_fp32_router.lab import refit

pytestmark = pytest.mark.on_lines("0.16", "0.17", "0.18", "0.19")
Refused = megatron_fp32_router.CombinationRefusedError

#: Sender and receiver. The first is the usual one in reinforcement learning: the rollout runs without the plugin.
CASES = ("all off", "buffers all", "all all", "off off")
RECIPE: dict[str, Any] = {"hidden": 32, "moe_ffn": 32, "experts": 4, "seq_length": 16, "vocab": 64}


@pytest.fixture(scope="module")
def handed_over(request: pytest.FixtureRequest, release: Version) -> list[dict[str, Any]]:
    return lab.run_ranks(
        "refit:hand_over",
        lab.Recipe(**RECIPE, data_parallel=2, linear_bias=True),
        {"cases": list(CASES)},
        megatron=request.config.getoption("--megatron"),
        plugin=True,
        python_path=[str(request.config.rootpath / "tests" / "programs")],
    )


@pytest.mark.parametrize("case", CASES)
def test_the_receiver_gets_the_senders_weights_in_its_own_dtype(case: str, handed_over: Any, release: Version) -> None:
    sender, receiver = (rank[case] for rank in handed_over)
    dtypes = [torch.float32 if setting == "all" else torch.bfloat16 for setting in case.split()]
    for sent, got, before in zip(sender[1:], receiver[1:], receiver[:-1], strict=True):
        routers = [name for name in got if name.endswith(("router.weight", "router.bias"))]
        assert len(routers) == 4
        for name in routers:
            assert [sent[name].dtype, got[name].dtype] == dtypes
            assert torch.equal(got[name], sent[name].to(got[name].dtype))
            assert not torch.equal(got[name], before[name])
        for name in got.keys() - set(routers):
            if name.endswith("expert_bias"):
                # 0.18 and later hand over persistent buffers, in the sender's dtype.
                assert torch.equal(got[name], (sent if release >= Version("0.18") else before)[name])
            elif "tokens_per_expert" not in name:
                assert torch.equal(got[name], sent[name]), name


def test_sending_leaves_the_senders_weights_alone(handed_over: Any) -> None:
    for case in CASES:
        first, second, third = handed_over[0][case]
        for name in first:
            grown = (
                first[name] * 1.01 if name.endswith(("weight", "bias")) and "expert_bias" not in name else first[name]
            )
            assert torch.equal(second[name], grown), (case, name)
            assert second[name].dtype == third[name].dtype


# One rank: what the messages say --------------------------------------------------------------------------------------


def plan(source: Any, destination: Any) -> Any:
    planner = import_module("megatron.core.resharding.planner")
    make = getattr(planner, "build_local_reshard_plan", None) or planner.build_centralized_reshard_plan
    return make(source, destination, num_experts=RECIPE["experts"])


def groups() -> Any:
    return import_module("megatron.core.process_groups_config").ProcessGroupCollection.use_mpu_process_groups()


def test_a_sender_without_the_plugin_is_refused_while_planning(plugin: Any) -> None:
    recipe = lab.Recipe(**RECIPE)
    with lab.parallel(recipe):
        here = refit.model(recipe, 1, groups())
        plugin(protect="buffers")
        elsewhere = refit.model(recipe, 2, groups())
        plugin()
        planner = import_module("megatron.core.resharding.planner")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(planner, "extract_param_metadata", planner.extract_param_metadata.__wrapped__)
            with pytest.raises(Refused, match=r"from bfloat16 to float32.*sending rank 0.*without.*PROTECT=buffers"):
                plan(elsewhere, here)
            assert plan(here, here)
        assert plan(elsewhere, here)


def test_a_plan_that_does_not_say_how_an_fp32_weight_is_received_is_refused(plugin: Any) -> None:
    recipe = lab.Recipe(**RECIPE)
    with lab.parallel(recipe):
        here = refit.model(recipe, 1, groups())
        megatron_fp32_router.disable()
        elsewhere = refit.model(recipe, 2, groups())
        unnamed = plan(here, elsewhere)
        plugin()
        for home in ("megatron.core.resharding.refit", "megatron.core.resharding"):
            with pytest.raises(Refused, match=r"router\.weight in float32.*before the plugin was turned on"):
                import_module(home).execute_reshard_plan(unnamed, here, elsewhere, service=None)


def test_a_plan_is_megatrons_own_once_it_has_been_executed(plugin: Any) -> None:
    """So that it may be used again, also after disable()."""
    recipe = lab.Recipe(**RECIPE)
    with lab.parallel(recipe):
        here, there = refit.model(recipe, 1, groups()), refit.model(recipe, 2, groups())
        home = import_module("megatron.core.resharding.refit")
        service = home.get_or_create_service("gloo")
        made = plan(here, there)
        home.execute_reshard_plan(made, here, there, service=service)
        megatron_fp32_router.disable()
        assert [op.param_name for op in made.send_ops] == [op.param_name for op in plan(here, there).send_ops]
        with torch.no_grad():
            here.decoder.layers[0].mlp.router.weight.add_(1.0)
        home.execute_reshard_plan(made, here, there, service=service)
        assert torch.equal(here.decoder.layers[0].mlp.router.weight, there.decoder.layers[0].mlp.router.weight)
