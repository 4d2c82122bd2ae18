"""The layer-wise distributed optimizer with fp32 routers: two ranks end on the bits of ranks that update everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packaging.version import Version

from megatron_fp32_router import lab

# 0.16 gathers in one way, 0.17 in two, 0.18 and 0.19 in three.
pytestmark = pytest.mark.on_lines("0.16", "0.17", "0.19")

#: One layer: its router is the only fp32 parameter, and one of the ranks owns none.
RECIPE: dict[str, Any] = {"layers": 1, "hidden": 32, "moe_ffn": 32, "experts": 4, "seq_length": 32, "vocab": 64}
KINDS = ("torch_dist", "torch")
OFF = [f"off gather {kind}" for kind in KINDS]
ROUTER = "module.module.decoder.layers.0.mlp.router.weight"


@pytest.fixture(scope="module")
def modes(release: Version) -> list[str]:
    since = {"gather": "0.16", "overlap": "0.17", "layout": "0.18"}
    return [mode for mode, first in since.items() if release >= Version(first)]


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, modes: list[str], tmp_path_factory: Any) -> list[dict[str, Any]]:
    return lab.run_ranks(
        "layer_wise:train",
        lab.Recipe(**RECIPE, data_parallel=2, overlap=False, expert_bias=False),
        {
            "modes": ["plain", *modes],
            "resumes": [*OFF, *(f"on {mode} {kind}" for mode in modes if mode != "overlap" for kind in KINDS)],
            "folder": str(tmp_path_factory.mktemp("layer_wise")),
        },
        megatron=request.config.getoption("--megatron"),
        plugin=True,
        python_path=[str(request.config.rootpath / "tests" / part) for part in ("programs", "")],
    )


def test_every_rank_ends_on_the_bits_of_a_rank_that_updates_everything(trained: Any, modes: list[str]) -> None:
    for mode in modes:
        assert sorted(rank[mode]["mine"] for rank in trained) == [[], [ROUTER]]
        for number, rank in enumerate(trained):
            assert rank["plain"]["mine"] == [ROUTER]
            for name, value in rank[mode]["parameters"].items():
                assert torch.equal(value, rank["plain"]["parameters"][name]), f"{mode}, rank {number}: {name}"
    # Megatron asks the first rank's first parameter for the dtype; here the first rank has none in fp32.
    assert trained[0]["gather"]["mine"] == []


def test_a_checkpoint_is_resumed_as_it_was_saved(trained: Any, modes: list[str]) -> None:
    for case in [f"on {mode} {kind}" for mode in modes if mode != "overlap" for kind in KINDS]:
        for number, rank in enumerate(trained):
            saved, loaded = rank[case]["saved"], rank[case]["loaded"]
            assert saved.keys() == loaded.keys()
            for name, value in loaded.items():
                assert torch.equal(value, saved[name]), f"{case}, rank {number}: {name}"


@pytest.mark.parametrize("case", OFF)
def test_after_a_run_without_the_plugin_all_ranks_have_the_owners_main_copy_of_the_router(
    trained: Any, case: str
) -> None:
    saved = {name: value for rank in trained for name, value in rank[case]["saved"].items()}
    router = ROUTER.removeprefix("module.")
    assert saved[router].dtype == torch.bfloat16
    for number, rank in enumerate(trained):
        for name, value in rank[case]["loaded"].items():
            expected = saved[f"{router}.main"] if name == router else saved[name]
            assert name.startswith("group") or torch.equal(value, expected), f"rank {number}: {name}"
