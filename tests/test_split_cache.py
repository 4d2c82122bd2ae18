"""The split that is kept for a step: which writes it must notice, and what it must not keep."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from benchmarks import accuracy

from megatron_fp32_router.gating import choose, linear, schedule, split, split_cache


def operands() -> accuracy.Operands:
    return accuracy.synthetic(48, 64, 16)["random"]


def doubled_in_place(weight: torch.nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(2)


def doubled_behind_torch(weight: torch.nn.Parameter) -> None:
    weight.data.mul_(2)  # no trace in _version: fused optimizers, NCCL and weight loaders write like this


def doubled_by_another_storage(weight: torch.nn.Parameter) -> None:
    weight.data = weight.data * 2


def doubled_by_a_load(weight: torch.nn.Parameter) -> None:
    module = torch.nn.Module()
    module.weight = weight
    module.load_state_dict({"weight": weight.detach() * 2})


def doubled_in_a_buffer_that_it_views(weight: torch.nn.Parameter) -> None:
    buffer = torch.empty(weight.numel())
    buffer.copy_(weight.detach().flatten())
    weight.data = buffer.view(weight.shape)
    split_cache.parts_of(weight)
    buffer.mul_(2)  # a gather of parameters


WRITES = [
    doubled_in_place,
    doubled_behind_torch,
    doubled_by_another_storage,
    doubled_by_a_load,
    doubled_in_a_buffer_that_it_views,
]


@pytest.mark.parametrize("write", WRITES)
def test_no_write_between_two_steps_or_outside_of_them_is_missed(write: Any) -> None:
    weight = torch.nn.Parameter(operands().w)
    twice = split.split_weight(weight.detach() * 2)
    with schedule.one_step():
        split_cache.parts_of(weight)
    write(weight)
    with schedule.one_step():
        assert torch.equal(split_cache.parts_of(weight), twice)
    weight = torch.nn.Parameter(operands().w)
    outside = split_cache.parts_of(weight)
    write(weight)
    assert torch.equal(split_cache.parts_of(weight), twice)
    assert not torch.equal(outside, twice)


@pytest.mark.parametrize("write", [doubled_in_place, doubled_by_another_storage, doubled_by_a_load])
def test_a_write_that_the_tensor_shows_is_noticed_inside_a_step_too(write: Any) -> None:
    weight = torch.nn.Parameter(operands().w)
    twice = split.split_weight(weight.detach() * 2)
    with schedule.one_step():
        first = split_cache.parts_of(weight)
        assert split_cache.parts_of(weight) is first
        write(weight)
        assert torch.equal(split_cache.parts_of(weight), twice)


def test_two_layers_that_take_turns_at_one_address_have_a_split_each() -> None:
    storage = torch.zeros(16, 64)
    with schedule.one_step():
        for value in (1.0, 2.0, 3.0):
            layer = torch.nn.Parameter(torch.empty(0))
            storage.fill_(value)
            layer.data = storage.view(16, 64)  # a new object: its _version is 0 each time
            assert float(split_cache.parts_of(layer)[-1, 0]) == value
            kept = weakref.ref(layer)
            del layer
            assert kept() is not None  # or the next one could have its id
    assert kept() is None


@pytest.mark.parametrize("hooks", ["checkpoint", "saved on the CPU", "detached"])
def test_hooks_on_saved_tensors_do_not_make_a_step_keep_more(hooks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "why_not", lambda *_: "")
    o = operands()
    x, weight = o.x.clone().requires_grad_(), torch.nn.Parameter(o.w)
    with schedule.one_step():
        for _ in range(3):
            if hooks == "checkpoint":
                logits = torch.utils.checkpoint.checkpoint(
                    linear.RouterLinear.apply, x, weight, None, torch.float32, use_reentrant=False
                )
            else:
                around = (
                    torch.autograd.graph.save_on_cpu()
                    if hooks == "saved on the CPU"
                    else torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.detach)
                )
                with around:
                    logits = linear.RouterLinear.apply(x, weight, None, torch.float32)
            logits.backward(o.g)
        assert len(schedule.running[0].kept) == 1
    assert torch.equal(weight.grad, 3 * split.gradients(o.g, o.x, split.split_weight(o.w), False, True)[1])


def test_splits_are_released_at_the_end_of_a_step_even_if_it_fails() -> None:
    weight = torch.nn.Parameter(operands().w)
    with contextlib.suppress(ZeroDivisionError), schedule.one_step():
        split_cache.parts_of(weight)
        assert len(schedule.running) == 1
        1 / 0  # noqa: B018
    assert not schedule.running


def test_tensors_of_inference_mode_are_split_anew() -> None:
    with torch.inference_mode(), schedule.one_step():
        weight = torch.ones(8, 8)
        assert split_cache.parts_of(weight) is not split_cache.parts_of(weight)


class OnCuda:
    """A CUDA weight as far as the cache can tell: its device, and whether its stream is being captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing, self.stream = False, 1
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": self.stream})
        )
        monkeypatch.setattr(split_cache, "split_weight", lambda weight: object())
        self.device, self.dtype, self.shape, self._version = torch.device("cuda", 0), torch.float32, (8, 8), 0

    def is_inference(self) -> bool:
        return False

    def data_ptr(self) -> int:
        return 4096

    def stride(self) -> tuple[int, int]:
        return 8, 1


def test_a_graph_of_one_layer_splits_inside_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    weight: Any = OnCuda(monkeypatch)
    with schedule.one_step():
        eager = split_cache.parts_of(weight)
        weight.capturing = True
        captured = split_cache.parts_of(weight)
        assert captured is not eager  # a replay would find the numbers of the step that captured
        weight.capturing = False
        assert split_cache.parts_of(weight) is eager  # and eager code never those of a graph


def test_a_graph_of_the_whole_schedule_splits_once_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weight: Any = OnCuda(monkeypatch)
    weight.capturing = True
    with schedule.one_step():
        assert split_cache.parts_of(weight) is split_cache.parts_of(weight)


def test_another_stream_makes_its_own_split(monkeypatch: pytest.MonkeyPatch) -> None:
    weight: Any = OnCuda(monkeypatch)
    with schedule.one_step():
        first = split_cache.parts_of(weight)
        weight.stream = 2
        assert split_cache.parts_of(weight) is not first
        weight.stream = 1
        assert split_cache.parts_of(weight) is first
