"""Agreement: before the first step, every rank learns whether all that train with it are protected in the same way.

A difference between ranks makes gradient buffers of different dtypes, and collectives over those hang or garble.
So nothing here is a collective: ranks write into the key-value store through which torch.distributed set up the
default process group, which asks nothing of a rank that lacks the plugin. What a rank says is written when DDP
wraps its model. Before the first Megatron collective that a difference could harm, each waits, for a bounded time,
for the verdict.

Who is compared: each rank names the ranks it shares a process group of Megatron's with, those are asked whom they
name, and so on. A rank that trains with them is named by another rank, whether it has the plugin or not. A rank that is
in the same job for something else (rollouts, rewards, data) is not named, and not waited for.

What it costs, once: a few store operations a rank and up to a second of polling; one rank reads what all have
said (1 to 2 KiB each) and writes the verdict for each. Afterwards: one comparison when an optimizer is built, and one
a step. A program that only runs inference builds no optimizer, and its ranks are not compared.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch

from megatron_fp32_router.casts.router import below_fp32
from megatron_fp32_router.errors import RanksDisagreeError
from megatron_fp32_router.log import say
from megatron_fp32_router.patching.digest import digest
from megatron_fp32_router.patching.megatron import of_module
from megatron_fp32_router.patching.registry import mismatch, registry, runs, status
from megatron_fp32_router.ranks import verdict
from megatron_fp32_router.settings import PREFIX
from megatron_fp32_router.version import __version__
from megatron_fp32_router.wrapping.survey import protected_in, tensors_of

#: Keys in the store, beside those of statements, which are numbers of ranks.
_ROOM: Final = f"{__name__.partition('.')[0]}/agreement"
_JUDGE, _VERDICT, _READ = "judge", "verdict", "read"

#: What of Megatron's source is compared: all that patches replace or rely on, and no comment or annotation in it.
_SOURCE: Final = "the fingerprint of Megatron's source"

#: Seconds until the first rank says whom it is waiting for.
_PATIENCE: Final = 10.0
#: Seconds beyond the timeout that the verdict itself may take; reading from 4,096 ranks takes a few.
_GRACE: Final = 30.0
#: Seconds that rank 0, whose process may host the store, gives the others to read bad news before it raises.
_READ_FAILURE_GRACE_SECONDS: Final = 5.0

#: The set of all ranks: every bit is set.
_EVERYBODY: Final = -1

#: The models that the other ranks know of.
_told: Final[weakref.WeakSet[torch.nn.Module]] = weakref.WeakSet()


class _Agreed:
    """What has been agreed about in one default process group. Of a set of ranks, bit r is rank r."""

    group: weakref.ref[Any] | None = None
    #: Those that share a process group with this rank, and those with whom it has agreed.
    peers: int = 0
    ranks: int = 0
    #: What to raise when there was no agreement.
    failure: str | None = None
    #: Who warns, where the user wants a warning only. Rank 0 may lack the plugin.
    speaker: int = 0


def what_must_agree() -> dict[str, str]:
    """What every rank must say alike. Each entry is compared by itself.

    What is logged and how long ranks wait may differ. A patch that waits for its module is left out: a pipeline stage
    need not import what another one does. A patch that somebody has wrapped (a profiler on rank 0, say) still works,
    and counts as applied. The monitor's patches are left out where it is off; its interval is always compared.
    """
    settings, megatron = registry.settings, of_module(sys.modules["megatron.core"])
    patches = {
        f"patch {record.id!r}": "applied" if record.state == "displaced" and runs(record.id) else record.state
        for record in status()
        if record.state != "armed"
    }
    return {
        "the plugin's version": __version__,
        f"{PREFIX}_PROTECT": settings.protect,
        f"{PREFIX}_ON_MISMATCH": settings.on_mismatch,
        # In a look of the monitor the ranks wait for each other.
        f"{PREFIX}_MONITOR": str(settings.monitor or "off"),
        f"{PREFIX}_UNTESTED": settings.untested,
        f"{PREFIX}_PRODUCTS": settings.products,
        f"{PREFIX}_LIKE": settings.like or "unset",
        "Megatron": str(megatron),
        _SOURCE: digest(megatron),
        **patches,
    }


def _totals(models: Iterable[torch.nn.Module]) -> tuple[int, int]:
    """Over these models: how many protected routers there are, and how many of their tensors are fp32 or better."""
    routers = {id(router): router for module in models for _, router in protected_in(module)}
    tensors = [tensor for router in routers.values() for _, tensor, _ in tensors_of(router)]
    return len(routers), sum(not below_fp32(tensor.dtype) for tensor in tensors)


def _statement(at_optimizer: bool) -> dict[str, Any]:
    """What this rank writes: what must agree, which other ranks to ask, and how many tensors it has."""
    routers, tensors = _totals(registry.models - _told)
    # Ranks that it has agreed with are not asked again. Without any group of Megatron's, all ranks may train with it.
    peers = _Agreed.peers & ~_Agreed.ranks or (1 << torch.distributed.get_world_size()) - 1
    return {
        "peers": hex(peers | 1 << torch.distributed.get_rank()),
        "says": what_must_agree(),
        # Not compared; printed only with a difference.
        "where": {_SOURCE: str(of_module(sys.modules["megatron.core"]).path or "place unknown")},
        "host": socket.gethostname(),
        "local world size": os.environ.get("LOCAL_WORLD_SIZE", ""),
        "at optimizer": at_optimizer,
        "routers": routers,
        "tensors": tensors,
    }


# The store -------------------------------------------------------------------------------------------------------


def store(room: str | None = None) -> Any:
    """A part of the default process group's store for the plugin alone; None where there is no store or no other rank.

    Args:
        room: what the keys in it begin with.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return None
    if distributed.get_backend() == "fake":
        return None  # a dry run: torch's fake process group has no other ranks
    from torch.distributed import distributed_c10d

    # torch has no public name for it. The group was set up through it, so using it needs no answer of another rank.
    get = getattr(distributed_c10d, "_get_default_store", None)
    if get is None or distributed.get_backend() == "mpi":
        say(
            logging.WARNING,
            f"the default process group has no key-value store (torch {torch.__version__}, "
            f"{distributed.get_backend()}), so the ranks have not compared whether they all run the plugin alike",
            once=True,
        )
        return None
    return distributed_c10d.PrefixStore(room or _ROOM, get())


def _listen(store: Any, said: dict[int, dict[str, Any]], named: int, each: bool = False) -> int:
    """Read into `said` what the ranks in `named` have written, and the ranks that those name; returns all of them.

    Reads nothing until all in `named` have written. With `each` it asks for every rank, at one operation a rank.
    """
    while keys := [str(rank) for rank in _ranks(named) if not _is_ready(said, rank)]:
        if not store.check(keys):
            keys = [key for key in keys if each and store.check([key])]
        known = named
        texts = store.multi_get(keys) if store.has_extended_api() else [store.get(key) for key in keys]
        for key, text in zip(keys, texts, strict=True):
            said[int(key)] = json.loads(text)
            named |= int(said[int(key)]["peers"], 16)
        if named == known:
            break
    return named


def _ranks(bits: int) -> list[int]:
    return [rank for rank in range(bits.bit_length()) if bits >> rank & 1]


def _is_ready(said: dict[int, dict[str, Any]], rank: int) -> bool:
    return rank in said and bool(said[rank]["at optimizer"])


# The rank's own part ---------------------------------------------------------------------------------------------


def _wait(store: Any, rank: int, peers: int) -> dict[str, Any]:
    """Wait for the verdict about this rank and all that train with it.

    The lowest rank gives it when all have spoken. If one takes too long, the first rank that notices gives it.
    """
    timeout = registry.settings.agree_timeout
    started = time.monotonic()
    said: dict[int, dict[str, Any]] = {}
    leads, told, pause, key = peers & -peers == 1 << rank, False, 0.01, f"{_VERDICT}/{rank}"
    # Polling, because a wait inside the store would lock out torch's own threads that use the same connection.
    while not store.check([key]):
        waited = time.monotonic() - started
        if leads:
            peers = _listen(store, said, peers)
            if waited > _PATIENCE and not told:
                told = True
                peers = _listen(store, said, peers, each=True)
                _say_who_is_awaited(rank, said, peers)
        if waited > timeout or (leads and all(_is_ready(said, peer) for peer in _ranks(peers))):
            _give_verdict(store, rank, said, peers, waited)
        if waited > timeout + _GRACE:
            raise RuntimeError(f"no verdict after {waited:.0f} s: the rank that had to write it has gone")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.5)
    found: dict[str, Any] = json.loads(store.get(key))
    return found


def _give_verdict(store: Any, rank: int, said: dict[int, dict[str, Any]], peers: int, waited: float) -> None:
    """Write the verdict for all that train together, unless another rank has. One rank at a time does so."""
    if store.compare_set(_JUDGE, "", str(rank)) != str(rank).encode():
        return
    if not store.check([f"{_VERDICT}/{rank}"]):
        peers = _listen(store, said, peers, each=True)
        found = verdict.verdict_on(_ranks(peers), torch.distributed.get_world_size(), said, waited)
        for peer in _ranks(peers):
            store.set(f"{_VERDICT}/{peer}", json.dumps({**found, "ranks": hex(peers)}))
    _delete(store, _JUDGE)


def _say_who_is_awaited(rank: int, said: dict[int, dict[str, Any]], peers: int) -> None:
    from megatron_fp32_router.ranks import difference

    silent = [peer for peer in _ranks(peers) if peer not in said]
    building = [peer for peer in said if not _is_ready(said, peer)]
    text = difference.awaited(registry.settings.agree_timeout, silent, building)
    say(logging.INFO, text, threshold=registry.settings.log, speaker=rank)


def _leave(store: Any, rank: int, found: dict[str, Any]) -> None:
    """Delete what this rank has in the store, once it has read the verdict.

    A process group that is set up again may use the same store, and must not find an older agreement there.
    """
    _delete(store, str(rank), f"{_VERDICT}/{rank}")
    if found["problems"]:
        readers = store.add(_READ, 1)
        end = time.monotonic() + _READ_FAILURE_GRACE_SECONDS
        while rank == 0 and readers < found["present"] and time.monotonic() < end:
            time.sleep(0.05)
            readers = store.add(_READ, 0)


def _delete(store: Any, *keys: str) -> None:
    # Some kinds of store cannot delete. Then short keys stay.
    with contextlib.suppress(NotImplementedError, RuntimeError):
        for key in keys:
            store.delete_key(key)


def publish(*holders: Any) -> None:
    """Write this rank's statement so far. `holders` hold the process groups of its model. Does not wait."""
    if registry.settings.agree_timeout and (room := store()) is not None and not _agrees_with_all(*holders):
        _attempt(lambda: room.set(str(torch.distributed.get_rank()), json.dumps(_statement(at_optimizer=False))))


def agree(anew: bool = False) -> None:
    """Wait, for a bounded time, until all ranks that train with this one are known to agree.

    Once per default process group, unless more ranks have come to train with this one.

    Args:
        anew: look whether they have.

    Raises:
        RanksDisagreeError: ranks differ, or said nothing in time (under on_mismatch="raise").
    """
    if anew or not _is_agreed():
        room = store()
        if room is None:
            return
        # More than once where this rank had been judged by what it had said before its last model.
        while not _agrees_with_all():
            _attempt(lambda: _agree(room))
    _raise_or_warn()


def _raise_or_warn() -> None:
    if _Agreed.failure is not None:
        mismatch(RanksDisagreeError, _Agreed.failure, speaker=_Agreed.speaker)


def _agree(store: Any) -> None:
    if not registry.settings.agree_timeout:
        _Agreed.ranks = _EVERYBODY
        say(
            logging.INFO,
            f"{PREFIX}_AGREE_TIMEOUT=0: the ranks do not compare whether they all run the plugin alike",
            threshold=registry.settings.log,
        )
        return
    rank, statement = torch.distributed.get_rank(), _statement(at_optimizer=True)
    store.set(str(rank), json.dumps(statement))
    _told.update(registry.models)  # a job that sets up its process group again tells of the models it wraps then
    found = _wait(store, rank, int(statement["peers"], 16))
    _leave(store, rank, found)
    ranks = int(found["ranks"], 16)
    _Agreed.ranks |= ranks
    _Agreed.speaker = found["speaker"]
    # Where ranks differ, nothing was agreed, and this one cannot differ from it.
    problems = found["problems"] or _own_difference(rank, found["says"])
    if problems:
        _Agreed.ranks = _EVERYBODY
        listed = "\n".join(f"  - {problem}" for problem in problems)
        _Agreed.failure = (
            f"the {ranks.bit_count()} ranks do not all run the plugin alike, so training would hang or mix up "
            f"gradients:\n{listed}\nGive every rank the same installation and the same environment. "
            f"{PREFIX}_AGREE_TIMEOUT (now {registry.settings.agree_timeout:g}) is how many seconds a slow rank may "
            f"take, and 0 compares nothing; {PREFIX}_ON_MISMATCH=warn trains on as it is."
        )
    else:
        say(
            logging.INFO,
            f"megatron-fp32-router {__version__}: {found['line']}, protect={registry.settings.protect}",
            threshold=registry.settings.log,
            speaker=_Agreed.speaker,
        )


def _own_difference(rank: int, agreed: dict[str, str]) -> list[str]:
    """How this rank differs by now from what was agreed: the verdict may come before it has wrapped its last model."""
    return [
        f"{label} is {value} on rank {rank} (host {socket.gethostname()}) by now, but {agreed[label]} was agreed"
        for label, value in what_must_agree().items()
        if agreed.get(label, value) != value
    ]


def _attempt(step: Callable[[], None]) -> None:
    """Run a step that uses the store. It fails when the store's host, or a rank that should answer, is gone."""
    try:
        step()
    except RuntimeError as error:
        _Agreed.ranks = _EVERYBODY
        _Agreed.failure = (
            "the key-value store of the default process group failed while the ranks were compared: "
            f"{error}. The rank that hosts it may have ended; what it said is in its own log."
        )
        _raise_or_warn()


def _is_agreed() -> bool:
    """Whether this rank has agreed with others. In a default process group that was set up anew it has not."""
    distributed = torch.distributed
    group = distributed.group.WORLD if distributed.is_available() else None
    if group is None:
        return False
    if _Agreed.group is None or _Agreed.group() is not group:
        _Agreed.group, _Agreed.peers, _Agreed.ranks, _Agreed.failure = weakref.ref(group), 0, 0, None
    return _Agreed.ranks != 0


def _agrees_with_all(*holders: Any) -> bool:
    """Whether it has agreed with all that share a process group with it now, see _reach()."""
    agreed = _is_agreed()
    _Agreed.peers |= _reach(*holders)
    return agreed and not _Agreed.peers & ~_Agreed.ranks


def _reach(*holders: Any) -> int:
    """The ranks of all process groups in Megatron's parallel_state, and in `holders`: models, and what DDP is given.

    A group is an attribute, or one level below: in a list, or in a collection of groups.
    """
    models = [part for holder in holders if isinstance(holder, torch.nn.Module) for part in holder.modules()]
    owners = [sys.modules.get("megatron.core.parallel_state"), *holders, *models]
    values = {id(value): value for owner in owners for value in getattr(owner, "__dict__", {}).values()}
    found = 0
    for value in values.values():
        inside = value if isinstance(value, (list, tuple, dict)) else getattr(value, "__dict__", ())
        for group in (value, *(inside.values() if isinstance(inside, Mapping) else inside)):
            if isinstance(group, torch.distributed.ProcessGroup):
                with contextlib.suppress(KeyError):  # one that has been taken down
                    found |= sum(1 << rank for rank in torch.distributed.get_process_group_ranks(group))
    return found
