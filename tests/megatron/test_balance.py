"""The balance update: the same bits as integers give, whatever upstream's function would have done."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_fp32_router import lab

RATE = 1e-3


def finalize() -> Any:
    return import_module("megatron.core.distributed.finalize_model_grads")


def expected(bias: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """fp32 bias plus sign(total - E*count) * rate: Python's own integers, one fp32 addition."""
    total = sum(int(count) for count in counts)
    signs = np.array([np.sign(total - len(counts) * int(count)) for count in counts], dtype=np.float32)
    return bias.astype(np.float32) + signs * np.float32(RATE)


def layers(router: Any, number: int, **fields: Any) -> Any:
    """A chunk of `number` wrapped routers and nothing else."""
    wrap = import_module("megatron.core.transformer.module").Float16Module
    first = router(**fields)
    others = [lab.make_router(first.config) for _ in range(number - 1)]
    return torch.nn.ModuleList([wrap(r.config, r) for r in [first, *others]]), first.config


def routers(chunk: Any) -> list[Any]:
    kind = import_module("megatron.core.transformer.moe.router").TopKRouter
    return [module for module in chunk.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("start", [0.0, 0.75, 6.9, 34.5])
def test_a_tiny_update_takes_effect_at_every_size_of_bias(start: float, router: Any, plugin: Any) -> None:
    chunk, config = layers(router, 2)
    counts = np.array([600, 680, 640, 640, 641, 639, 700, 580])
    for r in routers(chunk):
        r.expert_bias.fill_(start)
        r.local_tokens_per_expert.copy_(torch.from_numpy(counts))
    before = routers(chunk)[0].expert_bias.numpy().copy()
    finalize()._update_router_expert_bias([chunk], config)
    for r in routers(chunk):
        assert (r.expert_bias.numpy() == expected(before, counts)).all()


def sixty_four_ranks(r: Any) -> np.ndarray:
    """40,840 tokens for expert 0, in 64 parts of 608 to 676, where the mean over experts is 40,960."""
    parts = 608 + np.arange(64, dtype=np.int64) * 7 % 61
    missing = 40840 - int(parts.sum())
    parts += missing // 64
    parts[: missing % 64] += 1
    parts.sort()  # the larger ones come where bf16's spacing is 256, and are rounded up by more than 100 each
    assert parts.sum() == 40840
    assert parts[0] >= 608
    assert parts[-1] <= 676
    rest = 8 * 40960 - 40840
    others = np.full((64, 7), rest // (64 * 7), dtype=np.int64)
    others[0, 0] += rest - others.sum()
    for part, other in zip(parts, others, strict=True):
        r.local_tokens_per_expert += torch.from_numpy(np.concatenate([[part], other]))
    return np.concatenate([[40840], others.sum(axis=0)])


@pytest.mark.shows("D6")
def test_upstream_loses_count_of_forty_thousand_tokens_and_moves_the_bias_the_wrong_way(router: Any) -> None:
    chunk, config = layers(router, 1)
    r = routers(chunk)[0]
    counts = sixty_four_ranks(r)
    assert r.local_tokens_per_expert.double().numpy()[0] > counts.sum() / 8 > counts[0]
    finalize()._update_router_expert_bias([chunk], config)
    assert r.expert_bias[0] < 0


@pytest.mark.repairs("D6")
def test_forty_thousand_tokens_in_sixty_four_parts_are_counted_and_judged_exactly(router: Any, plugin: Any) -> None:
    chunk, config = layers(router, 1)
    r = routers(chunk)[0]
    counts = sixty_four_ranks(r)
    assert (r.local_tokens_per_expert.double().numpy() == counts).all()
    before = r.expert_bias.numpy().copy()
    finalize()._update_router_expert_bias([chunk], config)
    assert (r.expert_bias.numpy() == expected(before, counts)).all()
    assert r.expert_bias[0] > 0


def test_a_million_tokens_counted_six_hundred_at_a_time_and_a_count_above_two_to_the_24(
    router: Any, plugin: Any
) -> None:
    chunk, config = layers(router, 1)
    r = routers(chunk)[0]
    for _ in range(2000):
        r.local_tokens_per_expert += 600
    assert (r.local_tokens_per_expert == 1_200_000).all()
    r.local_tokens_per_expert += 2**24 + 1
    assert r.local_tokens_per_expert.long().tolist() == [1_200_000 + 2**24 + 1] * 8
    # One expert has one token more, which fp32 cannot tell: the update does.
    r.local_tokens_per_expert[1:] -= 1
    counts, before = r.local_tokens_per_expert.numpy().copy(), r.expert_bias.numpy().copy()
    assert len(set(counts.astype(np.float32))) == 1
    finalize()._update_router_expert_bias([chunk], config)
    assert (r.expert_bias.numpy() == expected(before, counts)).all()


def test_floats_added_by_third_parties_are_counted_too(router: Any, plugin: Any) -> None:
    r = routers(layers(router, 1)[0])[0]
    r.local_tokens_per_expert += torch.full((8,), 300.0)
    r.local_tokens_per_expert += torch.full((8,), 301)
    assert r.local_tokens_per_expert.tolist() == [601.0] * 8


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    # Around a common size, as balanced experts are: that is where floating point loses the sign.
    counts=st.builds(
        lambda size, offsets: [size + offset for offset in offsets],
        st.sampled_from([0, 2**11, 2**24, 2**31, 2**48]),
        st.lists(st.integers(0, 5), min_size=8, max_size=8),
    ),
    bias=st.lists(st.floats(-64, 64, width=32), min_size=8, max_size=8),
)
def test_the_rule_is_that_of_integers(counts: list[int], bias: list[float], router: Any, plugin: Any) -> None:
    if not torch.distributed.is_initialized():
        router()
    rule = import_module("megatron.core.transformer.moe.moe_utils").get_updated_expert_bias
    tokens = torch.tensor(counts, dtype=torch.float64)
    updated = rule(tokens, torch.tensor(bias, dtype=torch.float32), RATE)
    assert (updated.numpy() == expected(np.array(bias), np.array(counts, dtype=object))).all()


def test_layers_with_different_numbers_of_experts_and_without_a_bias_are_updated(router: Any, plugin: Any) -> None:
    chunk, config = layers(router, 2)
    kind = import_module("megatron.core.transformer.moe.router").TopKRouter
    small = [r for r in chunk.modules() if isinstance(r, kind)][1]
    small.expert_bias = torch.zeros(4)
    small.local_tokens_per_expert = torch.tensor([1.0, 2.0, 3.0, 2.0], dtype=torch.float64)
    chunk.append(torch.nn.Module())
    chunk[-1].expert_bias = None
    chunk[-1].local_tokens_per_expert = None
    finalize()._update_router_expert_bias([chunk], config)
    assert (small.expert_bias.numpy() == expected(np.zeros(4), np.array([1, 2, 3, 2]))).all()
    reset = getattr(finalize(), "reset_model_temporary_tensors", None)
    if reset is not None:
        reset(config, [chunk])
    assert not small.local_tokens_per_expert.any()


def test_no_tokens_move_nothing(router: Any, plugin: Any) -> None:
    chunk, config = layers(router, 1)
    finalize()._update_router_expert_bias([chunk], config)
    assert not routers(chunk)[0].expert_bias.any()


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def operations(router: Any, number: int) -> list[str]:
    chunk, config = layers(router, number)
    with Counting() as counting:
        finalize()._update_router_expert_bias([chunk], config)
        reset = getattr(finalize(), "reset_model_temporary_tensors", None)
        if reset is not None:
            reset(config, [chunk])
    return counting.calls


def test_the_update_issues_no_more_operations_than_upstream_and_one_collective(router: Any, plugin: Any) -> None:
    import megatron_fp32_router

    ours = operations(router, 4)
    many = operations(router, 16)
    assert len(many) == len(ours)
    assert sum("allreduce" in call for call in ours) == 1
    megatron_fp32_router.disable()
    upstream = operations(router, 4)
    assert len(ours) <= len(upstream), (ours, upstream)


def test_rules_about_training_mode_are_those_of_the_release(router: Any, plugin: Any, release: Any) -> None:
    chunk, config = layers(router, 2)
    frozen, student = routers(chunk)
    frozen.eval()
    for r in (frozen, student):
        r.local_tokens_per_expert.copy_(torch.arange(8))
    finalize()._update_router_expert_bias([chunk], config)
    assert bool(student.expert_bias.any())
    assert bool(frozen.expert_bias.any()) == (release.minor < 17)


def test_recomputation_does_not_count_twice(build: Any, plugin: Any) -> None:
    room = build(recompute=True)
    seen: list[float] = []
    room.on_counts.append(lambda _: seen.extend(float(r.local_tokens_per_expert.sum()) for _, r in room.routers()))
    room.step(lab.text_batches(room.recipe, seed=1))
    assert seen == [float(room.recipe.tokens_per_step * room.recipe.topk)] * room.recipe.layers


@pytest.mark.since("0.16")
def test_padding_tokens_are_not_counted(router: Any, plugin: Any) -> None:
    r = routers(layers(router, 1)[0])[0]
    routing_map = torch.zeros(10, 8, dtype=torch.bool)
    routing_map[:, :2] = True
    r._apply_expert_bias(routing_map, padding_mask=torch.arange(10) >= 6)
    assert r.local_tokens_per_expert.tolist() == [6.0, 6.0] + [0.0] * 6


def test_frozen_biases_stay_where_the_release_knows_them(router: Any, plugin: Any, release: Any) -> None:
    chunk, config = layers(router, 1)
    r = routers(chunk)[0]
    r.frozen_expert_bias = True
    r.local_tokens_per_expert.copy_(torch.arange(8))
    finalize()._update_router_expert_bias([chunk], config)
    assert bool(r.expert_bias.any()) == (release.minor < 19)


def test_the_sign_that_scripts_study_simulates_is_upstreams(router: Any) -> None:
    """For docs/study.md: counts in bf16, several layers of them at once."""
    from studies.simulation import upstream_sign

    router()  # what the rule asks for its process group is there
    rule = import_module("megatron.core.transformer.moe.moe_utils").get_updated_expert_bias
    counts_TE = torch.from_numpy(np.random.default_rng(1).poisson(700, (50, 64))).bfloat16()
    moved = rule(counts_TE.clone(), torch.zeros(50, 64), 1.0)
    assert (moved.sign() == upstream_sign(counts_TE)).all()
