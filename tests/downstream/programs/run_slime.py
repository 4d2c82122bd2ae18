"""slime's Megatron: a checkout whose router registers itself with slime and asks it for its top-k (docker/patch).

slime.utils.routing_replay is written here by the facts of the original, which needs the whole package around it: it
records the experts of each router's forward on their way out of top-k, and gives them back in the same order.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from common import batches, begin, dtypes, end, parallel, routers, train

recorded: dict[Any, list[torch.Tensor]] = {}
stage, current = "fallthrough", None


def register_routing_replay(router: Any) -> None:
    def before(*_: Any) -> None:
        global current
        current = router

    recorded[router] = []
    router.register_forward_pre_hook(before)


def get_routing_replay_compute_topk(compute_topk: Callable[..., Any]) -> Callable[..., Any]:
    def replayed(scores: torch.Tensor, topk: int, num_groups: Any = None, group_topk: Any = None) -> Any:
        if stage == "replay":
            indices = recorded[current].pop(0)
            return scores.gather(1, indices), indices
        probs, indices = compute_topk(scores, topk, num_groups, group_topk)
        if stage == "record":
            recorded[current].append(indices)
        return probs, indices

    return replayed


def pretend_to_be_slime() -> None:
    """Put the module where the changed router imports it from."""
    for name in ("slime", "slime.utils", "slime.utils.routing_replay"):
        sys.modules[name] = types.ModuleType(name)
    vars(sys.modules["slime.utils.routing_replay"]).update(
        register_routing_replay=register_routing_replay,
        get_routing_replay_compute_topk=get_routing_replay_compute_topk,
    )


def main() -> None:
    """Train; then record a batch's experts and replay them with other biases, which must not matter."""
    global stage
    folder = begin()
    parallel()
    pretend_to_be_slime()
    import tiny

    config, model = tiny.model()
    seen = {"registered": len(recorded), "dtypes": dtypes(model)} | train(model, config)

    tokens_BS, positions_BS, mask = next(batches(9))
    maps: list[torch.Tensor] = []
    for _, router in routers(model):
        router.register_forward_hook(lambda _router, _inputs, outputs: maps.append(outputs[1]))
    with torch.no_grad():
        stage = "record"
        model(tokens_BS, positions_BS, mask)
        for _, router in routers(model):
            router.expert_bias.copy_(torch.rand(len(router.expert_bias)))
        stage = "replay"
        model(tokens_BS, positions_BS, mask)
    first, second = maps[: len(maps) // 2], maps[len(maps) // 2 :]
    end(folder, replayed=len(second) == 2 and all(map(torch.equal, first, second)), **seen)


main()
