"""An optimizer's step waits for the device no more often with the plugin, and copies no bf16 parameter more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bootstrap import ensure_emerging_optimizers, ensure_transformer_engine

from megatron_fp32_router import lab

pytestmark = pytest.mark.on_lines("0.19")

BF16 = torch.bfloat16
AWARE = {"use_precision_aware_optimizer": True}
DISTRIBUTED = {"optimizer": "distributed"}
#: name -> fields of lab.Recipe.
CASES: dict[str, dict[str, Any]] = {
    "plain Adam": {},
    "distributed Adam": DISTRIBUTED,
    "precision-aware": {**DISTRIBUTED, "optimizer_extra": AWARE},
    "precision-aware, fp32 main copies": {**DISTRIBUTED, "optimizer_extra": {**AWARE, "store_param_remainders": False}},
    "precision-aware, bf16 gradients and moments": {
        **DISTRIBUTED,
        "optimizer_extra": {**AWARE, "main_grads_dtype": BF16, "exp_avg_dtype": BF16, "exp_avg_sq_dtype": BF16},
        "ddp_extra": {"grad_reduce_in_fp32": False},
    },
    "Muon": {"optimizer_extra": {"optimizer": "muon"}},
}
#: The norms of gradients in two dtypes are joined: `cat` and `linalg_vector_norm`, on the device.
JOINED = {"precision-aware, bf16 gradients and moments": 2}


def test_a_step_has_no_more_operations_waits_or_copies_than_without_the_plugin(request: pytest.FixtureRequest) -> None:
    engine = (str(ensure_transformer_engine()), "")
    cases = [
        {"name": name, "fields": {"clip_grad": 1e-2, **fields}, **({"engine": engine} if "aware" in name else {})}
        for name, fields in CASES.items()
    ]
    tests = request.config.rootpath / "tests"
    (found,) = lab.run_ranks(
        "steps:count",
        lab.Recipe(),
        {"cases": cases},
        megatron=request.config.getoption("--megatron"),
        plugin=True,
        python_path=[tests, tests / "programs", *ensure_emerging_optimizers()],
    )
    for name in CASES:
        off, on = found[f"{name} off"], found[f"{name} on"]
        assert on["waits"] == off["waits"], name
        # An fp32 router weight is not copied into a bf16 one.
        assert on["copied"] <= off["copied"], name
        assert sum(on["operations"].values()) - sum(off["operations"].values()) <= JOINED.get(name, 0), name
    assert found["plain Adam on"]["copied"] < found["plain Adam off"]["copied"]
