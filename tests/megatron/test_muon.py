"""Muon and the other emerging optimizers update fp32 router weights as they do separate fp32 parameters, and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bootstrap import ensure_emerging_optimizers
from packaging.version import Version

from megatron_fp32_router import lab

# 0.16 makes it in a module of its own, as 0.17 does; 0.18 and 0.19 have a table of optimizers.
pytestmark = pytest.mark.on_lines("0.16", "0.19")

LR, DECAY, MOMENTUM = 1e-3, 0.1, 0.95

#: emerging_optimizers, muon_utils.py: "quintic".
QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
#: How far the arithmetic of --muon-fp32-matmul-prec may be from float64; "medium" multiplies in bf16.
ERROR = {"highest": 1e-7, "high": 1e-7, "medium": 3e-4}


def cases(release: Version) -> list[dict[str, Any]]:
    """As programs/resume.py takes them."""

    def case(name: str, optimizer: str, *formats: str, plugin: str = "on on", **fields: Any) -> dict[str, Any]:
        settings = {"optimizer": optimizer, "weight_decay": DECAY, **fields.pop("settings", {})}
        fields = {
            "layers": 1,
            "data_parallel": 1 if "tensor_parallel" in fields else 2,
            "lr": LR,
            "clip_grad": 1e-2,
            "optimizer_extra": settings,
            **fields,
        }
        before, after = plugin.split()
        return {"name": name, "fields": fields, "plugin": before, "then": after, "formats": [*formats]}

    experts = {"expert_parallel": 2}
    apart = {"settings": {"muon_fp32_matmul_prec": "high"}, "overlap": False}
    both = ("torch_dist", "torch")
    found = [
        case("experts", "muon", *both, settings={"muon_fp32_matmul_prec": "highest"}, **experts),
        case("tensors", "muon", "torch_dist", settings={"muon_tp_mode": "distributed"}, tensor_parallel=2),
        case("layer-wise", "dist_muon", *both, **{**apart, **experts}),
    ]
    if release >= Version("0.19"):
        found += [
            case("turned on", "muon", *both, plugin="off on"),
            # Without the plugin a load rounds expert_bias.
            case("turned off", "muon", "torch_dist", plugin="on off", expert_bias=False),
            case("layer-wise, turned on", "dist_muon", "torch_dist", plugin="off on", **apart),
            case("lion", "lion"),
            case("soap", "soap"),
        ]
    if release >= Version("0.20"):
        # Up to 0.19 it asks for something that emerging-optimizers 0.3.0 has not.
        found.append(case("adaptive_muon", "adaptive_muon"))
    return found


def left_to_adam(release: Version) -> dict[str, Any]:
    """The first case, with router weights that docs/limits.md has marked. Main has a mark for this alone."""
    mark = "use_muon" if release >= Version("0.20") else "is_embedding_or_output_parameter"
    return {**cases(release)[0], "name": "left to Adam", "marks": {mark: mark != "use_muon"}}


def _always_on(wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [case for case in wanted if case["plugin"] == case["then"] == "on"]


def _resumed(wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [case for case in wanted if case["formats"]]


@pytest.fixture(scope="module")
def wanted(release: Version) -> list[dict[str, Any]]:
    return cases(release)


@pytest.fixture(scope="module")
def where(request: pytest.FixtureRequest) -> dict[str, Any]:
    tests = request.config.rootpath / "tests"
    path = (tests, tests / "programs", *ensure_emerging_optimizers())
    return {"megatron": request.config.getoption("--megatron"), "plugin": True, "python_path": path}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("muon")
    return path


@pytest.fixture(scope="module")
def ranks(wanted: Any, release: Version, where: Any, folder: Path) -> list[dict[str, Any]]:
    beside = [*_always_on(wanted), left_to_adam(release)]
    arguments = {"cases": _resumed(wanted), "beside": beside, "folder": str(folder)}
    return lab.run_ranks("muon:write", lab.Recipe(data_parallel=2), arguments, **where)


def test_a_router_weight_has_the_bits_of_a_separate_fp32_parameter(ranks: Any, wanted: Any, release: Version) -> None:
    for case in [*_always_on(wanted), left_to_adam(release)]:
        updates = [rank["updates"][case["name"]] for rank in ranks]
        for name in updates[0]:
            owners = [update[name] for update in updates if update[name]["bits"]]
            assert len(owners) == (1 if case["name"] == "layer-wise" else 2)
            for one in owners:
                assert one["bits"] == [True] * 3, case["name"]
                assert one["norm"] > case["fields"]["clip_grad"]
                ours, twins = one["states"]
                assert ours.keys() == twins.keys()
                assert {value.dtype for value in ours.values()} == {torch.float32}
                assert all(torch.equal(value, twins[key]) for key, value in ours.items())
            # Every rank goes on with it.
            first, second = (update[name]["weights"] for update in updates)
            assert all(torch.equal(*pair) for pair in zip(first, second, strict=True)), case["name"]
            assert not torch.equal(first[-1], first[-1].bfloat16().float())


def test_what_muon_does_to_it_is_what_is_published(ranks: Any, wanted: Any) -> None:
    for case in _always_on(wanted):
        if case["fields"]["optimizer_extra"]["optimizer"] not in ("muon", "dist_muon"):
            continue
        atol = ERROR[case["fields"]["optimizer_extra"].get("muon_fp32_matmul_prec", "medium")]
        one = next(one for rank in ranks for one in rank["updates"][case["name"]].values() if one["bits"])
        exact = one["start"].double().numpy()
        momentum = np.zeros_like(exact)
        for gradient, weight in zip(one["gradients"], one["weights"], strict=True):
            momentum += (1 - MOMENTUM) * (gradient.double().numpy() - momentum)
            exact = exact * (1 - LR * DECAY) - LR * max(exact.shape) ** 0.5 * orthogonal(momentum)
            np.testing.assert_allclose(weight.double().numpy(), exact, rtol=0, atol=atol, err_msg=case["name"])


def test_a_user_can_leave_it_to_adam(ranks: Any) -> None:
    for rank in ranks:
        assert {one["kind"] for one in rank["updates"]["left to Adam"].values()} == {"AdamW"}


def orthogonal(matrix: Any) -> Any:
    """Newton-Schulz, of a matrix with fewer rows than columns."""
    x = matrix / np.linalg.norm(matrix)
    for a, b, c in QUINTIC:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def test_it_is_resumed_to_the_bits_of_a_run_that_never_stopped(
    ranks: Any, wanted: Any, where: Any, folder: Path
) -> None:
    for rank in ranks:
        for name, result in rank["written"].items():
            assert set(result["failures"].values()) == {""}, (name, result["failures"])
            assert result["disturbed"] == [], f"{name}: saving changed the training"
    arguments = {"cases": _resumed(wanted), "resharded": [], "folder": str(folder)}
    for rank in lab.run_ranks("resume:read", lab.Recipe(data_parallel=2), arguments, **where):
        for case in _resumed(wanted):
            for kind, found in rank[f"{case['name']} {case['then']}"].items():
                expected = {"failure": "", "loaded": [], "end": [], "losses": True}
                assert found == expected, (case["name"], kind)
