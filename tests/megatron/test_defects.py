"""Each of upstream's precision defects: to be seen with the plugin off, gone with it on.

One function a defect looks at a real Megatron and answers whether the defect is there. Oracles are NumPy integers
and float64.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from bootstrap import ensure_transformer_engine

from megatron_fp32_router import lab
from megatron_fp32_router.lab import transformer_engine
from megatron_fp32_router.lab.model import default_groups

EXACT = 6.9012345  # a bias that long runs reach (GLM-5.2 publishes 6.8 to 7.1); bf16 spacing there is 0.03
BUSY = {"seq_length": 256, "micro_batch": 4, "micro_batches": 4}  # about 1,000 tokens an expert and step


def wrap(router: Any) -> Any:
    """Cast `router` the way training does: through Megatron's own Float16Module."""
    return import_module("megatron.core.transformer.module").Float16Module(router.config, router).module


def exact_bits(tensor: torch.Tensor, value: float) -> bool:
    return bool((tensor.detach().double().numpy() == np.float64(np.float32(value))).all())


def d1(build: Any, router: Any) -> bool:
    room = build(bias_start=0.75, **BUSY)
    room.step(lab.text_batches(room.recipe, seed=1))
    return any(bool((r.expert_bias == 0.75).all()) for _, r in room.routers())


def d2(build: Any, router: Any) -> bool:
    built = wrap(router())
    state = {"expert_bias": torch.full_like(built.expert_bias, EXACT, dtype=torch.float32)}
    built.load_state_dict(state, strict=False)
    return not exact_bits(built.expert_bias, EXACT)


def d3(build: Any, router: Any) -> bool:
    return wrap(router()).state_dict()["expert_bias"].dtype != torch.float32


def d4(build: Any, router: Any) -> bool:
    return any(r.expert_bias.dtype != torch.float32 for _, r in build().routers())


def d5(build: Any, router: Any) -> bool:
    built = router()
    built.expert_bias.fill_(EXACT)
    return not exact_bits(wrap(built).expert_bias, EXACT)


def d6(build: Any, router: Any) -> bool:
    room = build(**BUSY)
    counted: dict[str, np.ndarray] = {}
    true: dict[str, np.ndarray] = {}

    def look(_: Any) -> None:
        for name, r in room.routers():
            counted[name] = r.local_tokens_per_expert.double().numpy().copy()

    def add(routing: Any) -> None:
        columns = routing.routing_map.numpy().astype(np.int64).sum(axis=0)
        true[routing.name] = true.get(routing.name, 0) + columns

    room.on_counts.append(look)
    with room.record_routing(add):
        for _ in range(3):
            true.clear()
            room.step(lab.text_batches(room.recipe, seed=1))
            if any((counted[name] != true[name]).any() for name in true):
                return True
    return False


def d7(build: Any, router: Any) -> bool:
    room = build()
    room.step(lab.text_batches(room.recipe, seed=1))
    moved = np.concatenate([np.abs(r.expert_bias.double().numpy()) for _, r in room.routers()])
    moved = moved[moved > 0]
    assert moved.size
    return not (moved == np.float64(np.float32(1e-3))).all()


def d8(build: Any, router: Any) -> bool:
    room = build(precision="fp16")
    counts = np.array([9000, 11000, 10500, 9500, 9999, 10001, 12000, 8000], dtype=np.int64)
    for _, r in room.routers():
        r.expert_bias.zero_()
        r.local_tokens_per_expert.copy_(torch.from_numpy(counts))
    finalize = import_module("megatron.core.distributed.finalize_model_grads")
    finalize._update_router_expert_bias(room.chunks, room.config)
    expected = np.sign(counts.sum() - counts.size * counts)
    return any((np.sign(r.expert_bias.double().numpy()) != expected).any() for _, r in room.routers())


def d9(build: Any, router: Any) -> bool:
    built = wrap(router(load_balancing="global_aux_loss"))
    for _ in range(300):
        built.ga_steps += 1
        built.global_tokens_per_expert += torch.full_like(built.global_tokens_per_expert, 601).long()
    return float(built.ga_steps) != 300 or bool((built.global_tokens_per_expert != 300 * 601).any())


def d10(build: Any, router: Any) -> bool:
    fields = {"moe_router_load_balancing_type": "quantile_balancing", "moe_aux_loss_coeff": 0.0}
    built = wrap(router(expert_bias=False, extra=fields))
    return built.qb_beta.dtype != torch.float32 or built.qb_beta_accum.dtype != torch.float32


def d11(build: Any, router: Any) -> bool:
    config = router().config
    inference = import_module("megatron.core.transformer.moe.router").InferenceTopKRouter
    built = inference(config, pg_collection=default_groups())
    built.expert_bias.fill_(EXACT)
    wrap(built)
    probs, _ = built._forward(torch.randn(4, 1, config.hidden_size, dtype=torch.bfloat16))
    assert probs.dtype == torch.bfloat16
    return not exact_bits(built.expert_bias, EXACT)


def rounded(parameter: torch.Tensor) -> bool:
    return bool((parameter.detach() == parameter.detach().bfloat16()).all())


def d12(build: Any, router: Any) -> bool:
    return any(rounded(r.weight) for _, r in build().routers())


def d13(build: Any, router: Any) -> bool:
    # A value of its own: 0.15 leaves the bias as the memory was, and memory that was zero looks rounded.
    built = router(linear_bias=True)
    with torch.no_grad():
        built.bias.fill_(EXACT)
    return not exact_bits(wrap(built).bias, EXACT)


def d14(build: Any, router: Any) -> bool:
    built = wrap(router())
    x = torch.randn(64, 1, built.config.hidden_size, dtype=torch.bfloat16)
    weights = torch.randn(64, built.config.num_moe_experts)
    probs, _ = built(x)
    (probs.float() * weights).sum().backward()
    return rounded(built.weight.grad)


def d15(build: Any, router: Any) -> bool:
    # Upstream rounds the gradient to bf16 afterwards (D14), so it is looked at where TransformerEngine returns it.
    built = wrap(router(hidden=256, router_dtype="fp32"))
    x = torch.randn(512, 1, 256).bfloat16()
    grad = torch.randn(512, 1, 8)
    with transformer_engine.router_in_use(ensure_transformer_engine()):
        moe_utils = import_module("megatron.core.transformer.moe.moe_utils")
        returned: list[torch.Tensor] = []
        gemm = moe_utils.te_general_gemm

        def noted(*args: Any, **kwargs: Any) -> Any:
            result = gemm(*args, **kwargs)
            returned.append(result[0])
            return result

        moe_utils.te_general_gemm = noted
        built.gating(x).backward(grad)
    found = next((t for t in returned if t.shape == built.weight.shape), built.weight.grad)
    assert found is not None
    assert found.dtype == torch.float32
    g, t = grad.double().view(512, 8), x.double().view(512, 256)
    error = (found.double() - g.t() @ t).abs() / (g.abs().t() @ t.abs())
    return bool(error.mean() > 1e-6)


def d22(build: Any, router: Any) -> bool:
    config = router(extra={"moe_router_fusion": True}).config
    built = import_module("megatron.core.transformer.moe.router").InferenceTopKRouter(
        config, pg_collection=default_groups()
    )
    wrap(built)
    with transformer_engine.router_in_use(ensure_transformer_engine()):
        try:
            built._forward(torch.randn(4, 1, config.hidden_size, dtype=torch.bfloat16))
        except RuntimeError as error:
            return str(error) == "expert_bias must be a float32 tensor"
    return False


def chooses_wrongly(router: Any, rows: list[list[float]], x: list[float]) -> bool:
    """Two experts of which the second scores higher, then the other way round: is either choice wrong?"""
    wrong = False
    for better in (0, 1):
        built = wrap(router(topk=1))
        hidden = torch.zeros(1, 1, built.config.hidden_size, dtype=torch.bfloat16)
        with torch.no_grad():
            built.weight.fill_(0)
            built.weight[:, 0] = -8
            for expert, row in zip((1 - better, better), rows, strict=True):
                built.weight[expert, : len(row)] = torch.tensor(row, dtype=built.weight.dtype)
            hidden[0, 0, : len(x)] = torch.tensor(x, dtype=torch.bfloat16)
            _, routing_map = built(hidden)
        wrong |= not bool(routing_map[0, better])
    return wrong


def d16(build: Any, router: Any) -> bool:
    # 4.03125 and 4.0625 differ in bf16; their sigmoids, 0.98256 and 0.98309, do not.
    return chooses_wrongly(router, [[4.03125], [4.0625]], [1.0])


def d17(build: Any, router: Any) -> bool:
    # Weights and input are exact in bf16; the logits 4 and 4.00390625 are not apart in it.
    return chooses_wrongly(router, [[4.0, 0.0], [4.0, 0.5]], [1.0, 2.0**-7])


def d18(build: Any, router: Any) -> bool:
    # As Megatron-FSDP initialises a model that was built and wrapped on the meta device. Deterministic mode fills
    # memory that nobody has written with NaN, which otherwise may be zero by chance.
    built = wrap(router().to("meta"))
    torch.use_deterministic_algorithms(True)
    try:
        built.to_empty(device="cpu", recurse=False)
    finally:
        torch.use_deterministic_algorithms(False)
    built.reset_parameters()
    assert bool(built.weight.any())
    return rounded(built.weight) or any(bool((buffer != 0).any()) for buffer in built.buffers())


def d23(build: Any, router: Any) -> bool:
    built = wrap(router())
    try:
        built._apply_expert_bias(torch.ones(10, 8, dtype=torch.bool), padding_mask=torch.arange(10) >= 6)
    except RuntimeError:
        return True
    return bool((built.local_tokens_per_expert != 6).any())


def without_a_bias(build: Any) -> Any:
    room = build()
    (_, last) = room.routers()[-1]
    last.expert_bias = None
    last.local_tokens_per_expert = None
    return room


def d24(build: Any, router: Any) -> bool:
    room = without_a_bias(build)
    try:
        import_module("megatron.core.distributed.finalize_model_grads")._update_router_expert_bias(
            room.chunks, room.config
        )
    except (AttributeError, TypeError):
        return True
    return False


def d25(build: Any, router: Any) -> bool:
    room = without_a_bias(build)
    try:
        import_module("megatron.core.distributed.finalize_model_grads").reset_model_temporary_tensors(
            room.config, room.chunks
        )
    except AttributeError:
        return True
    return False


LOOKS = [d1, d2, d3, d4, d5, d6, d7, d8, d9, d10, d11, d12, d13, d14, d15, d16, d17, d18, d22, d23, d24, d25]


@pytest.mark.parametrize("look", [pytest.param(f, marks=pytest.mark.shows(f.__name__.upper())) for f in LOOKS])
def test_the_defect_is_there_without_the_plugin(look: Any, build: Any, router: Any) -> None:
    assert look(build, router)


@pytest.mark.parametrize("look", [pytest.param(f, marks=pytest.mark.repairs(f.__name__.upper())) for f in LOOKS])
def test_the_defect_is_gone_with_the_plugin(look: Any, build: Any, router: Any, plugin: Any) -> None:
    assert not look(build, router)
