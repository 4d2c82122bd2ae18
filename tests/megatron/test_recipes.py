"""What well-known recipes train with is not refused, and a resume ends on the bits of a run that never stopped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bootstrap import NEWEST, ensure_emerging_optimizers, ensure_transformer_engine
from packaging.version import Version
from recipes import RECIPES, FlagSet

from megatron_fp32_router import lab

pytestmark = pytest.mark.on_lines("0.19")


def case(name: str, one: FlagSet) -> dict[str, Any]:
    """As programs/resume.py takes it, with the format that Megatron saves in by default if the recipe has no other."""
    fields = one.fields
    settings = fields["optimizer_extra"]
    kind = one.format or ("dp_reshardable" if fields.get("optimizer") == "distributed" else "torch_dist")
    typed = {key: getattr(torch, value) if key.endswith("_dtype") else value for key, value in settings.items()}
    fields = {**fields, "optimizer_extra": typed}
    found = {"name": name, "fields": fields, "plugin": "on", "then": "on", "formats": [kind]}
    if settings.get("use_precision_aware_optimizer"):
        found["engine"] = (str(ensure_transformer_engine()), "")
    return found


def test_every_recipe_trains_and_is_resumed_bit_for_bit(
    request: pytest.FixtureRequest, release: Version, tmp_path: Any
) -> None:
    if release < Version(NEWEST):
        return
    wanted = [case(name, one) for name, one in RECIPES.items()]
    where = {
        "megatron": request.config.getoption("--megatron"),
        "plugin": True,
        "python_path": [str(request.config.rootpath / "tests" / "programs"), *ensure_emerging_optimizers()],
        "timeout": 300.0,
    }
    two = lab.Recipe(data_parallel=2)
    for rank in lab.run_ranks("resume:write", two, {"cases": wanted, "folder": str(tmp_path)}, **where):
        for name, result in rank.items():
            assert set(result["failures"].values()) == {""}, (name, result["failures"])
            assert result["disturbed"] == [], f"{name}: saving changed the training"
            assert result["losses"][-1] < result["losses"][0], f"{name} does not learn"
    reading = {"cases": wanted, "resharded": [], "folder": str(tmp_path)}
    for rank in lab.run_ranks("resume:read", two, reading, **where):
        for one in wanted:
            for found in rank[f"{one['name']} on"].values():
                assert found == {"failure": "", "loaded": [], "end": [], "losses": True}, one["name"]
    for name in RECIPES:
        saved = torch.load(tmp_path / name / "truth-0.pt", weights_only=True)["middle"]
        of_routers = [
            key for key in saved if key.endswith(("router.weight", "router.weight.main", "router.expert_bias"))
        ]
        assert of_routers
        assert {saved[key].dtype for key in of_routers} == {torch.float32}, name
