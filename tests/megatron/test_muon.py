"""Megatron's Muon, from 0.18 on, updates fp32 router weights as it does a separate fp32 parameter, and is resumed."""

from __future__ import annotations

from typing import Any

import pytest
from bootstrap import ensure_wheel
from programs import resume

from megatron_fp32_router import lab

pytestmark = pytest.mark.on_lines("0.18", "0.19")

#: The package and what it imports. Unpacked, not installed: it asks for Python 3.12.
PACKAGES = (("emerging-optimizers", "0.3.0", "emerging_optimizers"), ("absl-py", "2.5.1", "absl"))


def test_muon_updates_routers_in_fp32_and_is_resumed(request: pytest.FixtureRequest, tmp_path: Any) -> None:
    places = [
        ensure_wheel(name, version, holds=holds, folder=f"packages/{name}-{version}")
        for name, version, holds in PACKAGES
    ]
    ranks = lab.run_ranks(
        "muon:train",
        lab.Recipe(**{**resume.TINY, "expert_bias": False, "overlap": False, "clip_grad": 0.0}, data_parallel=2),
        {"folder": str(tmp_path)},
        megatron=request.config.getoption("--megatron"),
        plugin=True,
        python_path=[*places, *(request.config.rootpath / "tests" / part for part in ("programs", ""))],
    )
    for layer_wise in ("False", "True"):
        owned = [rank[layer_wise]["owned"] for rank in ranks]
        # Layer-wise, each router is updated by one rank.
        assert sum(map(len, owned)) == (2 if layer_wise == "True" else 4)
        for rank in ranks:
            assert rank[layer_wise]["dtypes"] == ["torch.float32"]
            assert rank[layer_wise]["bits"] == [True] * 6
            assert rank[layer_wise]["differences"] == []
