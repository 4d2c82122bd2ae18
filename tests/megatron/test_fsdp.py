"""FSDP with fp32 routers, two ranks: torch's and Megatron's train as DDP does, and as an Adam of their own.

torch's is saved and resumed here; Megatron's in tests/trees, by the programs of checkouts: it needs megatron.training.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packaging.version import Version
from programs import fsdp

from megatron_fp32_router import lab
from megatron_fp32_router.lab import compat

# The oldest and the newest. Between them, 0.12 and 0.16 to 0.18 cannot train with FSDP2 at all, plugin off or on.
pytestmark = pytest.mark.on_lines("0.11", "0.19")


def case(plugin: str, then: str, **fields: Any) -> dict[str, Any]:
    return {
        "name": f"{plugin}->{then}",
        "formats": ["torch_dcp"],
        "plugin": plugin,
        "then": then,
        "fields": {**fsdp.FSDP2, **fields},
    }


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest, release: Version, tmp_path_factory: Any) -> list[dict[str, Any]]:
    """What each rank found in the first process, and under "read" in the second."""
    # Megatron has the format since 0.12.
    off = {"expert_bias": False}
    cases = [case("on", "on", recompute=True), case("off", "on", **off), case("on", "off", **off)]
    arguments = {
        "folder": str(tmp_path_factory.mktemp("fsdp")),
        "cases": cases if release >= Version("0.12") else [],
        "megatron_fsdp": release >= Version("0.16"),
    }
    where = {
        "megatron": request.config.getoption("--megatron"),
        "plugin": True,
        "python_path": [str(request.config.rootpath / "tests" / part) for part in ("programs", "")],
        "timeout": 400.0,
    }
    two = lab.Recipe(data_parallel=2)
    written: list[dict[str, Any]] = lab.run_ranks("fsdp:write", two, arguments, **where)
    if arguments["cases"]:
        for rank, found in zip(written, lab.run_ranks("fsdp:read", two, arguments, **where), strict=True):
            rank["read"] = found
    return written


def test_upstream_stops_at_two_dtypes_in_a_unit_and_at_fp32_parameters_without_main_grad(ranks: Any) -> None:
    for rank in ranks:
        units, gradients = rank["unrepaired"]
        assert "FSDP expects uniform original parameter dtype" in units
        assert "has no attribute 'main_grad'" in gradients


def test_routers_are_units_of_their_own_only_where_they_are_fp32_among_bf16(ranks: Any) -> None:
    for rank in ranks:
        assert rank["apart"] == {"bf16": [True], "fp32": [False]}


def test_the_first_step_has_the_bits_of_distributed_data_parallel(ranks: Any) -> None:
    for rank in ranks:
        ddp, fsdp2 = rank["ddp"], rank["fsdp2"]
        ours = [name for name in ddp if ".router." in name]
        assert any(name.endswith("router.weight.exp_avg") for name in ours)
        assert any(name.endswith("router.expert_bias") for name in ours)
        for name in ours:
            assert torch.equal(ddp[name], fsdp2[name]), name


def test_a_router_moves_as_an_fp32_parameter_of_its_own_adam(ranks: Any) -> None:
    found = ranks[0]["steps"]
    for name, start in found["start"].items():
        alone = torch.nn.Parameter(start.clone())
        exact = torch.nn.Parameter(start.double())
        adams = [compat.FusedAdamLike([alone], lr=1e-3), torch.optim.Adam([exact], lr=1e-3)]
        for gradients in found["gradients"]:
            alone.grad, exact.grad = gradients[name].clone(), gradients[name].double()
            for adam in adams:
                adam.step()
        assert found["end"][name].dtype == torch.float32
        assert torch.equal(found["end"][name], alone)
        assert (alone - exact).abs().max() < 2e-8
    assert all(torch.equal(found["end"][name], ranks[1]["steps"]["end"][name]) for name in found["end"])


def test_gradients_of_all_units_are_clipped_to_one_norm(ranks: Any) -> None:
    found = ranks[0]["steps"]
    for norm, clipped in zip(found["norms"], found["clipped"], strict=True):
        assert norm > 0.5
        assert clipped == pytest.approx(0.5, rel=1e-5)


@pytest.mark.since("0.12")
def test_a_resume_from_torch_dcp_ends_on_the_bits_of_a_run_that_never_stopped(ranks: Any) -> None:
    for number, rank in enumerate(ranks):
        assert rank["read"].keys() == {"on->on", "off->on", "on->off"}
        for name, found in rank["read"].items():
            assert rank[name]["disturbed"] == [], f"{name}: saving changed the training"
            assert rank[name]["losses"][-1] < rank[name]["losses"][0], f"{name} does not learn"
            good = {"failure": "", "loaded": [], "end": [], "losses": True}
            assert found["torch_dcp"] == good, f"{name}, rank {number}"


def test_torch_dist_cannot_be_saved_plugin_off_or_on(ranks: Any) -> None:
    """Megatron knows a sharded parameter by its local part, which torch 2.13 makes anew whenever it is asked."""
    for rank in ranks:
        assert rank["torch_dist"]["off"]
        assert rank["torch_dist"]["off"] == rank["torch_dist"]["on"]


@pytest.mark.since("0.19")
def test_the_first_step_of_megatron_fsdp_has_the_bits_of_distributed_data_parallel(ranks: Any) -> None:
    for rank in ranks:
        ddp, found = rank["ddp"], rank["megatron_fsdp"]
        assert found["weights"][1].keys() == found["biases"][0].keys() != set()
        for name, weight in found["weights"][1].items():
            assert weight.dtype == torch.float32
            assert torch.equal(weight, ddp[f"{name}.weight"]), name
            assert torch.equal(found["biases"][0][name], ddp[f"{name}.expert_bias"]), name


@pytest.mark.since("0.19")
def test_under_megatron_fsdp_a_router_moves_as_an_fp32_parameter_of_its_own_adam(ranks: Any) -> None:
    found = ranks[0]["megatron_fsdp"]
    for name, start in found["weights"][0].items():
        alone = torch.nn.Parameter(start.clone())
        adam = compat.FusedAdamLike([alone], lr=1e-3)
        for gradients, after in zip(found["gradients"], found["weights"][1:], strict=True):
            alone.grad = gradients[name].clone()
            assert alone.grad.dtype == torch.float32
            adam.step()
            assert torch.equal(after[name], alone), name
        assert not torch.equal(alone, alone.bfloat16().float())
    for one, other in zip(found["weights"], ranks[1]["megatron_fsdp"]["weights"], strict=True):
        assert all(torch.equal(weight, other[name]) for name, weight in one.items())


@pytest.mark.since("0.19")
def test_main_copies_below_fp32_would_round_a_routers_weight_and_are_refused(ranks: Any) -> None:
    for rank in ranks:
        for weight in rank["low"]["weights"]:
            assert weight.dtype == torch.float32
            assert torch.equal(weight, weight.bfloat16().float())
        assert "CombinationRefusedError: Megatron-FSDP's main copies in bfloat16" in rank["low"]["stopped"]
        assert "Set --megatron-fsdp-main-params-dtype to fp32" in rank["low"]["stopped"]
