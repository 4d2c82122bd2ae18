"""What the two ranks of tests/megatron/test_muon.py run."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from programs import resume

from megatron_fp32_router import lab
from megatron_fp32_router.lab import checkpoint


def write(recipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Three steps of routers beside separate parameters; then what resume:write does."""
    lab.leave_layout()
    return {
        "updates": {case["name"]: beside(case) for case in arguments["beside"]},
        "written": resume.write(recipe, arguments),
    }


def beside(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Router name -> what its weight went through where this rank updates it, and what it was on every rank."""
    resume.turn("on")
    recipe = resume.recipe_of(case)
    with lab.layout(recipe):
        lab.seed(recipe.seed)
        models = lab.build_model(recipe)
        for name, parameter in models[0].named_parameters():
            if name.endswith("router.weight"):
                vars(parameter).update(case.get("marks", {}))
        room = lab.wrap(recipe, models)
        found: dict[str, dict[str, Any]] = {}
        twins = {}
        for name, router in room.routers():
            found[name] = {"start": router.weight.detach().clone(), "weights": [], "gradients": [], "bits": []}
            inner = owner(room, router.weight)
            if inner is not None:
                twins[name] = (inner, *twin_of(inner, router.weight))
        batches = lab.text_batches(recipe, seed=7)
        for _ in range(resume.STEPS):
            room.step(batches)
            for name, router in room.routers():
                found[name]["weights"].append(router.weight.detach().clone())
                if name not in twins:
                    continue
                inner, other, parameter = twins[name]
                # Clipped where it lies.
                parameter.grad = router.weight.main_grad.detach().clone()
                found[name]["gradients"].append(parameter.grad.clone())
                other.step()
                found[name]["bits"].append(torch.equal(router.weight, parameter))
                found[name]["kind"] = type(inner).__name__
                found[name]["norm"] = room.grad_norm
                states = [inner.state[router.weight], other.state[parameter]]
                found[name]["states"] = [{k: v for k, v in one.items() if torch.is_tensor(v)} for one in states]
        return found


def owner(room: Any, weight: torch.Tensor) -> Any:
    """The inner optimizer that updates `weight` on this rank, or None."""
    inners = (one.optimizer for one in checkpoint.optimizers(room))
    return next((one for one in inners if group_of(one, weight)), None)


def group_of(inner: Any, weight: torch.Tensor) -> dict[str, Any] | None:
    return next((group for group in inner.param_groups if any(p is weight for p in group["params"])), None)


def twin_of(inner: Any, weight: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """A second optimizer like `inner`, and a separate fp32 parameter in it that starts as `weight`."""
    parameter = torch.nn.Parameter(weight.detach().clone())
    other = type(inner).__new__(type(inner))
    vars(other).update(vars(inner))
    other.state = defaultdict(dict)
    other.param_groups = [{**(group_of(inner, weight) or {}), "params": [parameter]}]
    return other, parameter
