"""verl's router replay: its own module patches Megatron, records the experts of each token and replays them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from common import batches, begin, dtypes, end, parallel, routers, train


def load() -> Any:
    """The module by itself: the package around it needs ray."""
    part = Path("verl", "utils", "megatron", "router_replay_patch.py")
    (path,) = [Path(entry, part) for entry in sys.path if Path(entry, part).is_file()]
    spec = importlib.util.spec_from_file_location("router_replay_patch", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Train while recording; then replay what was recorded last with other biases, which must not matter."""
    folder = begin()
    parallel()
    verl = load()
    verl.apply_router_replay_patch()
    import tiny

    config, model = tiny.model(enable_routing_replay=True)
    replay, action = verl.RouterReplay, verl.RouterReplayAction
    replay.set_global_router_replay_action(action.RECORD)
    seen = {"dtypes": dtypes(model)} | train(model, config)

    tokens_BS, positions_BS, mask = next(batches(9))
    with torch.no_grad():
        model(tokens_BS, positions_BS, mask)
    recorded = replay.get_recorded_data()
    chosen: list[torch.Tensor] = []
    for _, router in routers(model):
        router.expert_bias.copy_(torch.rand(len(router.expert_bias)))
        router.register_forward_hook(lambda _router, _inputs, outputs: chosen.append(outputs[1]))
    replay.set_replay_data(recorded)
    replay.set_global_router_replay_action(action.REPLAY_FORWARD)
    with torch.no_grad():
        model(tokens_BS, positions_BS, mask)
    expected = [
        torch.zeros_like(each).scatter(1, indices, True) for each, indices in zip(chosen, recorded, strict=True)
    ]
    same = all(torch.equal(*pair) for pair in zip(chosen, expected, strict=True))
    end(folder, replayed=same, routing=type(routers(model)[0][1]).routing.__module__, **seen)


main()
