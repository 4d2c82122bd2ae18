"""What the probe does in its own process: one function for each promise, each with an oracle in NumPy.

Shapes: T tokens, H hidden size, E experts.
"""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from megatron_fp32_router import disable, enable
from megatron_fp32_router.compat.probe_offload import offload
from megatron_fp32_router.compat.probe_proving import STEPS, Failed, LeftOut, Promise, prove_each
from megatron_fp32_router.lab import Lab, Recipe, Routing, build, make_config, make_router, seed, text_batches
from megatron_fp32_router.lab.model import default_groups
from megatron_fp32_router.patching.records import PATCHES
from megatron_fp32_router.patching.registry import status

#: About 500 tokens an expert and step, which bf16 cannot count; a bias at 0.75 swallows a bf16 step whole.
RECIPE: Final = Recipe(seq_length=256, micro_batch=4, micro_batches=2, bias_start=0.75)

#: Neither bf16 nor fp16 can hold it.
_EXACT: Final = 6.9012345


def prove(recipe: Recipe, arguments: dict[str, Any]) -> dict[str, Any]:
    """Try the promises that one rank can try, of the areas in `arguments["areas"]`; see prove_each."""
    promises = {name: promise for area in arguments["areas"] for name, promise in PROMISES.get(area, {}).items()}
    # Last, because it turns the plugin off and on again.
    promises |= {name: promises.pop(name) for name in ("upstream",) if name in promises}
    return prove_each(promises, recipe, arguments)


def _patches(recipe: Recipe) -> str:
    root = Path(str(import_module("megatron.core").__file__)).parents[2]
    for patch in PATCHES:
        # Some modules came or went with a release, and no wheel has megatron.legacy.
        path = root / patch.module.replace(".", "/")
        if path.with_suffix(".py").exists() or (path / "__init__.py").exists():
            import_module(patch.module)
    found = status()
    wrong = [f"{s.id} is {s.state} ({s.detail})" for s in found if s.state in ("drifted", "displaced", "off")]
    if wrong:
        raise Failed("; ".join(wrong))
    states = Counter(record.state for record in found)
    return ", ".join(f"{count} {state}" for state, count in sorted(states.items()))


def _tensors(router: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from router.named_parameters()
    yield from router.named_buffers()


def _casts(recipe: Recipe) -> str:
    compared = 0
    float16_module = import_module("megatron.core.transformer.module").Float16Module
    casts: dict[str, Callable[[Any], Any]] = {
        "Float16Module": lambda router: float16_module(router.config, router),
        "bfloat16()": lambda router: router.bfloat16(),
        "half()": lambda router: router.half(),
        "to(torch.bfloat16)": lambda router: router.to(torch.bfloat16),
    }
    for what, cast in casts.items():
        router = make_router(make_config(recipe))
        with torch.no_grad():
            for _, tensor in _tensors(router):
                tensor.fill_(_EXACT)
        before = {name: tensor.detach().cpu().double() for name, tensor in _tensors(router)}
        cast(router)
        for name, tensor in _tensors(router):
            if not torch.equal(tensor.detach().cpu().double(), before[name]):
                raise Failed(f"{what} leaves {name} as {tensor.dtype} with other bits")
            compared += 1
    return f"{compared} tensors keep their bits through {', '.join(casts)}"


def _router_and_input(recipe: Recipe) -> tuple[Any, torch.Tensor]:
    router = make_router(make_config(recipe))
    import_module("megatron.core.transformer.module").Float16Module(router.config, router)
    generator = torch.Generator().manual_seed(1)
    hidden_TBH = torch.randn(256, 1, recipe.hidden, generator=generator).to(torch.bfloat16)
    return router, hidden_TBH.to(router.weight.device)


def _gating(recipe: Recipe) -> str:
    router, hidden = _router_and_input(recipe)
    logits_TE = router.gating(hidden).reshape(-1, recipe.experts)
    if logits_TE.dtype != torch.float32:
        raise Failed(f"logits are {logits_TE.dtype}")
    tokens_TH = hidden.detach().cpu().double().numpy().reshape(-1, recipe.hidden)
    weight_EH = router.weight.detach().cpu().double().numpy()
    _close("logits", logits_TE, tokens_TH @ weight_EH.T, np.abs(tokens_TH) @ np.abs(weight_EH).T, recipe.hidden)

    upstream_TE = torch.randn(logits_TE.shape, generator=torch.Generator().manual_seed(2)).to(logits_TE.device)
    logits_TE.backward(upstream_TE)
    given_TE = upstream_TE.cpu().double().numpy()
    bound = np.abs(given_TE).T @ np.abs(tokens_TH)
    _close("the weight's gradient", router.weight.grad, given_TE.T @ tokens_TH, bound, tokens_TH.shape[0])
    return "logits and the weight's gradient are those of fp64 to the last bits of fp32"


def _close(what: str, found: torch.Tensor, exact: np.ndarray, magnitude: np.ndarray, terms: int) -> None:
    """Compare with the bound for a sum of `terms` products in fp32, in any order (Higham, section 3.1)."""
    error = np.abs(found.detach().cpu().double().numpy() - exact)
    allowed = (terms + 1) * 2.0**-24 * magnitude
    if (error > allowed).any():
        worst = float((error / allowed).max())
        raise Failed(f"{what}: {worst:.1f} times further from fp64 than fp32 may be")


def _choice(recipe: Recipe) -> str:
    router, hidden = _router_and_input(recipe)
    bias_E = np.linspace(0.5, 0.75, recipe.experts, dtype=np.float32)
    with torch.no_grad():
        router.expert_bias.copy_(torch.from_numpy(bias_E))
        probs, routing_map_TE = router(hidden)
    if probs.dtype != hidden.dtype:
        raise Failed(f"the dispatcher is handed {probs.dtype} where upstream hands it {hidden.dtype}")
    tokens_TH = hidden.cpu().double().numpy().reshape(-1, recipe.hidden)
    logits_TE = tokens_TH @ router.weight.detach().cpu().double().numpy().T
    scores_TE = 1 / (1 + np.exp(-logits_TE)) + bias_E.astype(np.float64)
    order_TE = np.argsort(-scores_TE, axis=1)
    expected_TE = np.zeros(scores_TE.shape, dtype=bool)
    np.put_along_axis(expected_TE, order_TE[:, : recipe.topk], True, axis=1)
    ranked_TE = np.take_along_axis(scores_TE, order_TE, axis=1)
    # Nearer than this, fp32 may order two scores either way.
    clear_T = ranked_TE[:, recipe.topk - 1] - ranked_TE[:, recipe.topk] > 1e-6
    wrong = int((routing_map_TE.cpu().bool().numpy() != expected_TE)[clear_T].any(axis=1).sum())
    if wrong:
        raise Failed(f"{wrong} of {int(clear_T.sum())} tokens go to other experts than in fp64")
    return f"{int(clear_T.sum())} tokens go to the experts that fp64 chooses"


def update(recipe: Recipe) -> str:
    """Counts and biases of this rank's routers, against integers. Compared when all steps are taken."""
    room = build(recipe)
    counted: dict[str, np.ndarray] = {}
    true: dict[str, np.ndarray] = {}

    def look(_: Lab) -> None:
        for name, router in room.routers():
            counted[name] = router.local_tokens_per_expert.cpu().double().numpy().copy()

    def add(routing: Routing) -> None:
        columns = routing.routing_map.cpu().numpy().astype(np.int64).sum(axis=0)
        true[routing.name] = true.get(routing.name, np.zeros_like(columns)) + columns

    room.on_counts.append(look)
    rate = np.float32(recipe.bias_rate)
    biases = {name: np.full(recipe.experts, recipe.bias_start, dtype=np.float32) for name, _ in room.routers()}
    batches = text_batches(recipe, seed=1)
    wrong: list[str] = []
    with room.record_routing(add):
        for step in range(1, STEPS + 1):
            true.clear()
            counted.clear()
            room.step(batches)
            for name, router in room.routers():
                counts_E, said_E = true[name], counted.get(name)
                if said_E is None or (said_E != counts_E).any():
                    wrong.append(f"step {step}: tokens are counted as {said_E}, and are {counts_E}")
                total_E = torch.from_numpy(counts_E)
                # Those that route other tokens through the same routers; no tensor or context parallelism here.
                group = import_module("megatron.core.parallel_state").get_data_parallel_group()
                torch.distributed.all_reduce(total_E, group=group)
                total = total_E.numpy()
                sign_E = np.sign(total.sum() - total.size * total).astype(np.float32)
                biases[name] = biases[name] + sign_E * rate
                found_E = router.expert_bias.cpu().numpy()
                if found_E.dtype != np.float32 or (found_E != biases[name]).any():
                    wrong.append(f"step {step}: expert_bias is {found_E}, and should be {biases[name]}")
                if float(router.local_tokens_per_expert.abs().sum()) != 0:
                    wrong.append(f"step {step}: local_tokens_per_expert is not zeroed")
    if wrong:
        raise Failed(wrong[0])
    return f"{STEPS} steps: counts and expert_bias have the bits of an integer computation"


def _inference(recipe: Recipe) -> str:
    kind = getattr(import_module("megatron.core.transformer.moe.router"), "InferenceTopKRouter", None)
    if kind is None:
        raise LeftOut("this Megatron has no InferenceTopKRouter")
    router, hidden = _router_and_input(recipe)
    other = kind(router.config, pg_collection=default_groups()).to(hidden.device)
    other.load_state_dict(router.state_dict())
    with torch.no_grad():
        probs, routing_map_TE = router(hidden)
        inferred, indices_Tk = other._forward(hidden)
    if inferred.dtype != probs.dtype:
        raise Failed(f"the dispatcher is handed {inferred.dtype} where training hands it {probs.dtype}")
    chosen_TE = torch.zeros_like(routing_map_TE, dtype=torch.bool).scatter_(1, indices_Tk.long(), True)
    if not torch.equal(chosen_TE, routing_map_TE.bool()):
        raise Failed("inference chooses other experts than training")
    return "InferenceTopKRouter chooses the experts that training chooses"


def _upstream(recipe: Recipe) -> str:
    """Where upstream itself loses nothing, the plugin changes nothing: compare with this tree's own code."""
    done = _gating_of_upstream(recipe)
    fp32 = dataclasses.replace(recipe, precision="fp32", load_balancing="aux_loss")
    trained = []
    for on in (False, True):
        (enable if on else disable)()
        seed(recipe.seed)
        room = build(fp32)
        batches = text_batches(fp32, seed=1)
        losses = [room.step(batches) for _ in range(STEPS)]
        trained.append((losses, [router.expert_bias.clone() for _, router in room.routers()]))
    (off, without), (on_, with_) = trained
    if off != on_:
        raise Failed(f"training in fp32 has the losses {on_}, and {off} without the plugin")
    if not all(torch.equal(one, other) for one, other in zip(without, with_, strict=True)):
        raise Failed("training in fp32 moves expert_bias otherwise than without the plugin")
    return f"{done}; {STEPS} steps in fp32 have the losses and biases of a training without the plugin"


def _gating_of_upstream(recipe: Recipe) -> str:
    router, hidden = _router_and_input(recipe)
    config, what = router.config, "fp64 logits"
    if hasattr(config, "moe_router_dtype"):
        config.moe_router_dtype = "fp64"
    else:
        hidden, what = hidden.float(), "fp32 logits"  # 0.11 computes in the input's dtype
    original = type(router).gating.__wrapped__
    results = []
    for gating in (type(router).gating, original):
        router.weight.grad = None
        leaf = hidden.detach().clone().requires_grad_()
        logits = gating(router, leaf)
        logits.backward(torch.ones_like(logits).cumsum(0))
        results.append({"logits": logits, "weight.grad": router.weight.grad, "input.grad": leaf.grad})
    for name, ours in results[0].items():
        theirs = results[1][name]
        if not torch.allclose(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6):
            raise Failed(f"{what}: {name} differs from what this tree's own gating computes")
    return f"{what} and their gradients are those of this tree's own gating"


def _checkpoint(recipe: Recipe) -> str:
    first = build(recipe)
    first.step(text_batches(recipe, seed=1))
    file = io.BytesIO()
    torch.save([chunk.state_dict() for chunk in first.chunks], file)
    file.seek(0)
    second = build(recipe)
    for chunk, state in zip(second.chunks, torch.load(file, weights_only=True), strict=True):
        chunk.load_state_dict(state)
    for (name, one), (_, other) in zip(first.routers(), second.routers(), strict=True):
        for tensor_name, saved in one.state_dict().items():
            if not torch.equal(saved, other.state_dict()[tensor_name]):
                raise Failed(f"{name}.{tensor_name} has other bits after saving and loading")
    losses = [room.step_without_optimizer(text_batches(recipe, seed=2)) for room in (first, second)]
    if losses[0] != losses[1]:
        raise Failed(f"the loaded model's loss is {losses[1]!r} where the saved one's is {losses[0]!r}")
    for (name, one), (_, other) in zip(first.routers(), second.routers(), strict=True):
        if not torch.equal(one.expert_bias, other.expert_bias):
            raise Failed(f"{name}.expert_bias goes on differently after loading")
    return "a saved and loaded model has the same router bits, loss and next update"


#: area -> what one rank can try of it; probe_areas.py has the rest.
PROMISES: Final[dict[str, dict[str, Promise]]] = {
    "router": {
        "patches": _patches,
        "casts": _casts,
        "gating": _gating,
        "choice": _choice,
        "update": update,
        "checkpoint": _checkpoint,
        "upstream": _upstream,
    },
    "inference": {"inference": _inference},
    "offload": {"offload": offload},
}
