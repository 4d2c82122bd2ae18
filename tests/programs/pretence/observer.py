"""Looks at every router of a training program that knows nothing of it, through torch's own hooks, and writes it down.

Nothing of Megatron is touched, but that biases start at 0.75. Each rank writes OBSERVE/rank-N.json when it ends:
`looks`, one for each forward, and the routers' dtypes and biases as they are then.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

START = 0.75

_routers: list[Any] = []
_looks: list[dict[str, Any]] = []


def _before(module: Any, args: Any) -> None:
    if type(module).__name__ == "TopKRouter" and not any(module is router for router in _routers):
        _routers.append(module)
        module.expert_bias.fill_(START)


def _after(module: Any, args: Any, output: Any) -> None:
    if type(module).__name__ != "TopKRouter" or not torch.is_grad_enabled():
        return
    (number,) = [i for i, router in enumerate(_routers) if router is module]
    _looks.append(
        {
            "router": number,
            "bias": module.expert_bias.double().tolist(),
            "chosen": output[1].sum(dim=0, dtype=torch.int64).tolist(),
            "counter": module.local_tokens_per_expert.double().tolist(),
        }
    )


def _write() -> None:
    plugin = sys.modules.get("megatron_fp32_router")
    found = {
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
atexit.register(_write)
