"""Who is asked: a job of 4,096 ranks, or of trainings beside each other, in one process."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from statements import statements
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_fp32_router.ranks import agreement


@pytest.fixture
def of_8() -> Iterator[Callable[[list[int]], Any]]:
    """`of_8(ranks)`: a process group of these, in a job of 8 whose other ranks torch only pretends to have."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield dist.new_group
    dist.destroy_process_group()


def test_every_rank_that_shares_a_process_group_is_found_wherever_the_group_is_stored(
    of_8: Callable[[list[int]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = ModuleType("parallel_state")
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", state)
    assert agreement._reach() == 0
    state.one, state.several, state.named = of_8([0, 1]), [of_8([0, 2])], {"cp": of_8([0, 3])}
    assert agreement._ranks(agreement._reach()) == [0, 1, 2, 3]
    # As DDP gets it, and as a layer deep in the model holds it.
    assert agreement._ranks(agreement._reach(SimpleNamespace(dp=of_8([0, 4])))) == [0, 1, 2, 3, 4]
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Identity()))
    model[0][0].tp_group = of_8([0, 5])
    model[0].pg_collection = SimpleNamespace(ep=of_8([0, 6]))
    assert agreement._ranks(agreement._reach(model)) == [0, 1, 2, 3, 5, 6]
    dist.destroy_process_group(state.one)
    assert agreement._ranks(agreement._reach()) == [0, 2, 3]


def test_a_rank_names_only_ranks_it_has_not_agreed_with_yet(
    of_8: Callable[[list[int]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", ModuleType("megatron.core"))
    monkeypatch.setattr(agreement, "_Agreed", type("_Agreed", (), {"peers": 0b111, "ranks": 0b11}))
    assert agreement._statement(at_optimizer=True)["peers"] == hex(0b101)
    # Where no group of Megatron's is known, everybody.
    agreement._Agreed.peers = 0
    assert agreement._statement(at_optimizer=True)["peers"] == hex(0b11111111)


def grid(rank: int) -> int:
    """Ranks of 4,096 that share a tensor-, pipeline- or data-parallel group with `rank`: TP=8, DP=32, PP=16."""
    tensor, data, pipeline = rank % 8, rank // 8 % 32, rank // 256
    peers = [t + 8 * data + 256 * pipeline for t in range(8)]
    peers += [tensor + 8 * d + 256 * pipeline for d in range(32)]
    peers += [tensor + 8 * data + 256 * p for p in range(16)]
    return sum(1 << peer for peer in set(peers))


class Counted:
    """A store that counts its operations."""

    def __init__(self, store: Any) -> None:
        self.store, self.calls = store, 0

    def __getattr__(self, name: str) -> Any:
        self.calls += 1
        return getattr(self.store, name)


def test_all_4096_ranks_of_a_training_are_found_with_few_operations() -> None:
    store = Counted(dist.HashStore())
    for rank, said in statements(4096).items():
        store.set(str(rank), json.dumps({**said, "peers": hex(grid(rank))}))
    store.calls, heard = 0, {}
    found = agreement._listen(store, heard, grid(0))
    assert found == (1 << 4096) - 1
    assert len(heard) == 4096
    assert store.calls < 20
    store.delete_key("4095")
    heard = {}
    assert agreement._listen(store, heard, grid(0)) == found  # others name it,
    assert 4095 not in heard  # but it has said nothing


def wait(ranks: dict[int, int], timeout: float, monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """What ranks (rank -> whom it names) of a job of 8 are told, each a thread."""
    store, told = dist.HashStore(), {}
    settings = SimpleNamespace(agree_timeout=timeout, log="info")
    monkeypatch.setattr(agreement, "registry", SimpleNamespace(settings=settings))
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)

    def one(rank: int, peers: int) -> None:
        store.set(str(rank), json.dumps({**statements(8)[rank], "peers": hex(peers)}))
        told[rank] = agreement._wait(store, rank, peers)
        agreement._leave(store, rank, told[rank])

    threads = [threading.Thread(target=one, args=item, daemon=True) for item in ranks.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not store.check(["judge"])
    assert not any(store.check([str(rank)]) or store.check([f"verdict/{rank}"]) for rank in ranks)
    return told


def test_two_trainings_in_one_job_are_two_agreements(monkeypatch: pytest.MonkeyPatch) -> None:
    # 1, 2, 5 hang together through 2 only.
    ranks = {1: 0b110, 2: 0b100110, 5: 0b100100, 3: 0b11000, 4: 0b11000}
    told = wait(ranks, 300.0, monkeypatch)
    assert {rank: (found["ranks"], found["problems"]) for rank, found in told.items()} == {
        **dict.fromkeys((1, 2, 5), (hex(0b100110), [])),
        **dict.fromkeys((3, 4), (hex(0b11000), [])),
    }
    assert told[5]["line"].startswith("all 3 ranks (of 8) on 1 host agree: 6 routers")
    assert told[5]["line"].endswith(": ranks 0, 3-4, 6-7")


def test_where_the_first_rank_is_silent_another_one_speaks_for_all_of_its_training_and_only_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = wait({1: 0b11, 2: 0b101, 3: 0b11000, 4: 0b11000, 6: 0b1100000}, 0.3, monkeypatch)
    for rank in (1, 2):
        # 1 and 2 need not know of each other: 0, which joins them, has not said so.
        assert re.findall("from (.*) \\(host", "".join(told[rank]["problems"])) == ["rank 0"]
    assert told[3]["problems"] == told[4]["problems"] == []
    assert re.findall("from (.*) \\(host", "".join(told[6]["problems"])) == ["rank 5"]


def test_a_verdict_that_has_been_given_is_not_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two ranks may lose patience at once. Who has read the first verdict has left, and nobody would delete another.
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    store = dist.HashStore()
    store.set("verdict/0", "the first")
    agreement._give_verdict(store, 0, statements(2), 0b11, 1.0)
    assert store.get("verdict/0") == b"the first"
    assert not store.check(["verdict/1"])
