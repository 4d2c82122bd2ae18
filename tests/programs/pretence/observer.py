"""Looks at every router of a training program that knows nothing of it, through torch's own hooks, and writes it down.

Nothing of Megatron is touched, but that biases start at 0.75 where no checkpoint has been loaded. Each rank writes
OBSERVE/rank-N.json when it ends: `first`, each router's weight at its first forward, `main`, the main copies of these
weights and their first moments before the first step of an optimizer that holds them whole, `looks`, one for each
forward, `losses`, a digest of the losses of all tokens for each forward of the model, and the routers' dtypes and
biases as they are then.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

START = 0.75

_routers: list[Any] = []
_first: list[Any] = []
_main: list[dict[str, Any]] = []
_losses: list[str] = []
_looks: list[dict[str, Any]] = []


def _before(module: Any, args: Any) -> None:
    if type(module).__name__ == "TopKRouter" and not any(module is router for router in _routers):
        _routers.append(module)
        _first.append(module.weight.double().tolist())
        if not module.expert_bias.any():
            module.expert_bias.fill_(START)


def _after(module: Any, args: Any, output: Any) -> None:
    if type(module).__name__ == "GPTModel":
        _losses.append(hashlib.sha256(output.detach().numpy().tobytes()).hexdigest())
    if type(module).__name__ != "TopKRouter" or not torch.is_grad_enabled():
        return
    (number,) = [i for i, router in enumerate(_routers) if router is module]
    _looks.append(
        {
            "router": number,
            "bias": module.expert_bias.double().tolist(),
            "chosen": output[1].sum(dim=0, dtype=torch.int64).tolist(),
            "scores": str(output[0].dtype),
            "counter": module.local_tokens_per_expert.double().tolist(),
        }
    )


def _before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    if len(_main) == len(_routers):
        return
    for group in optimizer.param_groups:
        for main in group["params"]:
            if main.shape == _routers[0].weight.shape and not hasattr(main, "full_tensor"):
                moment = optimizer.state[main].get("exp_avg", torch.zeros_like(main))
                _main.append({"value": main.double().tolist(), "exp_avg": moment.double().tolist()})


def _write() -> None:
    if not _routers:  # a process that a rank has started, to write a checkpoint
        return
    plugin = sys.modules.get("megatron_fp32_router")
    found = {
        "first": _first,
        "losses": _losses,
        "main": _main,
        "looks": _looks,
        "bias": [router.expert_bias.double().tolist() for router in _routers],
        "dtypes": [
            {name: str(getattr(router, name).dtype) for name in ("weight", "expert_bias", "local_tokens_per_expert")}
            for router in _routers
        ],
        "training": "megatron.training.training" in sys.modules,
        "plugin": getattr(plugin, "__file__", None),
        "status": {record.id: record.state for record in plugin.status()} if plugin else {},
    }
    path = Path(os.environ["OBSERVE"], f"rank-{os.environ['RANK']}.json")
    path.write_text(json.dumps(found), encoding="utf-8")


register_module_forward_pre_hook(_before)
register_module_forward_hook(_after)
register_optimizer_step_pre_hook(_before_step)
atexit.register(_write)
