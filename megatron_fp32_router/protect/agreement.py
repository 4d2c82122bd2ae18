"""Agreement: before the first step, every rank learns whether all the others are protected in the same way.

A difference between ranks makes gradient buffers of different dtypes, and collectives over those hang or garble.
So nothing here is a collective: ranks write into the key-value store through which torch.distributed set up the
default process group, which asks nothing of a rank that lacks the plugin. What a rank says is written when DDP
wraps its model. Before the first Megatron collective that a difference could harm, each waits, for a bounded time,
for the verdict that the last one to arrive writes.

What it costs, once: four store operations a rank and up to half a second of polling; one rank reads what all have
said (about 1 KiB each) in one request. Afterwards: one comparison when an optimizer is built, and one a step. A
program that only runs inference builds no optimizer, and its ranks are not compared.
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
from collections.abc import Callable
from typing import Any, Final

import torch

from megatron_fp32_router.errors import RanksDisagreeError
from megatron_fp32_router.protect import effect, verdict
from megatron_fp32_router.protect.verdict import ranks_text
from megatron_fp32_router.registry import mismatch, registry, replaces, status
from megatron_fp32_router.say import say
from megatron_fp32_router.settings import PREFIX
from megatron_fp32_router.upstream import of_module
from megatron_fp32_router.version import __version__

#: Names in the store. Other versions of the plugin must understand them, and the words in what ranks write.
_ROOM: Final = f"{__name__.partition('.')[0]}/agreement"
_ARRIVED, _JUDGE, _VERDICT, _READ = "arrived", "judge", "verdict", "read"

#: What of Megatron's source is compared: all that patches replace or rely on, and no comment or annotation in it.
_SOURCE: Final = "the fingerprint of Megatron's source"

#: Seconds until rank 0 says whom it is waiting for.
_PATIENCE: Final = 10.0
#: Seconds beyond the timeout that the verdict itself may take; reading from 4,096 ranks takes a few.
_GRACE: Final = 30.0
#: Seconds that rank 0, whose process may host the store, gives the others to read bad news before it raises.
_LAST_WORDS: Final = 5.0


class _Agreed:
    """The default process group that was agreed about, and what to raise when there was no agreement."""

    group: weakref.ref[Any] | None = None
    failure: str | None = None
    #: Who warns, where the user wants a warning only. Rank 0 may lack the plugin.
    speaker: int = 0


def what_must_agree() -> dict[str, str]:
    """What this rank says about itself, and every rank must say alike. One line is one thing that is compared.

    How much is logged and how long is waited may differ. A patch that waits for its module is not named: a pipeline
    stage need not import what another one does. One that somebody has wrapped still works: a profiler on rank 0, say.
    The monitor's patches are not named where it is off: its interval, which always is, speaks for them.
    """
    from megatron_fp32_router.compat import gate

    settings, megatron = registry.settings, of_module(sys.modules["megatron.core"])
    patches = {
        f"patch {record.id!r}": "applied" if record.detail.startswith("wrapped") else record.state
        for record in status()
        if record.state != "armed"
    }
    return {
        "the plugin's version": __version__,
        f"{PREFIX}_PROTECT": settings.protect,
        f"{PREFIX}_ON_MISMATCH": settings.on_mismatch,
        # Ranks meet in a look.
        f"{PREFIX}_MONITOR": str(settings.monitor or "off"),
        f"{PREFIX}_UNTESTED": settings.untested,
        "Megatron": str(megatron),
        _SOURCE: gate.digest(megatron),
        **patches,
    }


def _statement(at_optimizer: bool) -> dict[str, Any]:
    """What this rank writes: what must agree, and for information whose tensors it holds."""
    routers, tensors = effect.totals()
    return {
        "says": what_must_agree(),
        # Told only beside a difference: paths themselves may differ.
        "where": {_SOURCE: str(of_module(sys.modules["megatron.core"]).path or "place unknown")},
        "host": socket.gethostname(),
        "local world size": os.environ.get("LOCAL_WORLD_SIZE", ""),
        "at optimizer": at_optimizer,
        "routers": routers,
        "tensors": tensors,
    }


# The store -------------------------------------------------------------------------------------------------------


def store(room: str | None = None) -> Any:
    """A room of our own in the default process group's store; None where there is nobody to meet in it."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return None
    if distributed.get_backend() == "fake":
        return None  # a dry run: torch's fake process group has no other ranks
    from torch.distributed import distributed_c10d

    # torch has no public name for it. It is where the group was set up, so reaching it needs no other rank.
    get = getattr(distributed_c10d, "_get_default_store", None)
    if get is None or distributed.get_backend() == "mpi":
        say(
            logging.WARNING,
            f"the default process group has no key-value store (torch {torch.__version__}, "
            f"{distributed.get_backend()}), so nobody has compared whether all ranks run the plugin alike",
            threshold=registry.settings.log,
            once=True,
        )
        return None
    return distributed_c10d.PrefixStore(room or _ROOM, get())


def _read(store: Any, keys: list[str]) -> list[dict[str, Any]]:
    values = store.multi_get(keys) if store.has_extended_api() else [store.get(key) for key in keys]
    return [json.loads(value) for value in values]


def _written(store: Any, world: int) -> list[int]:
    """The ranks that have said something."""
    if store.check([str(rank) for rank in range(world)]):
        return list(range(world))
    return [rank for rank in range(world) if store.check([str(rank)])]


def _judge(store: Any, world: int, waited: float) -> dict[str, Any]:
    present = _written(store, world)
    statements = dict(zip(present, _read(store, [str(rank) for rank in present]), strict=True))
    return verdict.judge(world, statements, waited)


# The rank's own part ---------------------------------------------------------------------------------------------


def _wait(store: Any, rank: int, world: int) -> dict[str, Any]:
    """Arrive, and wait for the verdict; whoever notices first that it is due writes it."""
    timeout = registry.settings.agree_timeout
    started = time.monotonic()
    due = store.add(_ARRIVED, 1) == world
    judged = told = False
    pause = 0.01
    # Polling, because a wait inside the store would lock out torch's own threads that use the same connection.
    while not store.check([_VERDICT]):
        waited = time.monotonic() - started
        if (due or waited > timeout) and not judged:
            judged = True
            if store.add(_JUDGE, 1) == 1:
                store.set(_VERDICT, json.dumps(_judge(store, world, waited)))
                break
        if waited > timeout + _GRACE:
            raise RuntimeError(f"no verdict after {waited:.0f} s: the rank that had to write it has gone")
        if rank == 0 and waited > _PATIENCE and not told:
            told = True
            _say_who_is_awaited(store, world, timeout)
        time.sleep(pause)
        pause = min(pause * 1.5, 0.5)
    found: dict[str, Any] = json.loads(store.get(_VERDICT))
    return found


def _say_who_is_awaited(store: Any, world: int, timeout: float) -> None:
    present = _written(store, world)
    building = [
        rank
        for rank, statement in zip(present, _read(store, [str(rank) for rank in present]), strict=True)
        if not statement["at optimizer"]
    ]
    silent = sorted(set(range(world)) - set(present))
    parts = [f"a first word from {ranks_text(silent)}"] if silent else []
    parts += [f"the optimizer of {ranks_text(building)}"] if building else []
    say(
        logging.INFO,
        f"waiting up to {timeout:g} s for {' and '.join(parts) or 'the verdict'}, to learn whether all ranks run "
        "the plugin alike",
        threshold=registry.settings.log,
    )


def _leave(store: Any, rank: int, world: int, found: dict[str, Any]) -> None:
    """Note that this rank has read the verdict. After good news, leave the store as it was found.

    A process group that is set up again may meet in the same store, and must not find an older agreement there.
    """
    readers = store.add(_READ, 1)
    if found["problems"]:
        end = time.monotonic() + _LAST_WORDS
        while rank == 0 and readers < found["present"] and time.monotonic() < end:
            time.sleep(0.05)
            readers = store.add(_READ, 0)
        return
    # Some kinds of store cannot delete. Then three short keys stay.
    with contextlib.suppress(NotImplementedError, RuntimeError):
        store.delete_key(str(rank))
        if readers == world:
            for key in (_VERDICT, _ARRIVED, _JUDGE, _READ):
                store.delete_key(key)


def publish() -> None:
    """Write what this rank has to say so far. Waits for nobody."""
    if registry.settings.agree_timeout and not _is_agreed() and (room := store()) is not None:
        _attempt(lambda: room.set(str(torch.distributed.get_rank()), json.dumps(_statement(at_optimizer=False))))


def agree() -> None:
    """Wait, for a bounded time and once per default process group, until all ranks are known to agree.

    Raises:
        RanksDisagreeError: ranks differ, or said nothing in time (under on_mismatch="raise").
    """
    if _is_agreed():
        _judged()
        return
    room = store()
    if room is None:
        return
    _Agreed.group = weakref.ref(torch.distributed.group.WORLD)
    _Agreed.failure = None
    if not registry.settings.agree_timeout:
        say(
            logging.INFO,
            f"{PREFIX}_AGREE_TIMEOUT=0: nobody compares whether all ranks run the plugin alike",
            threshold=registry.settings.log,
        )
        return
    _attempt(lambda: _agree(room))
    _judged()


def _judged() -> None:
    if _Agreed.failure is not None:
        mismatch(RanksDisagreeError, _Agreed.failure, speaker=_Agreed.speaker)


def _agree(store: Any) -> None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    store.set(str(rank), json.dumps(_statement(at_optimizer=True)))
    effect.seen.clear()  # told; a job that sets up its process group again tells of the models it wraps then
    found = _wait(store, rank, world)
    _leave(store, rank, world, found)
    _Agreed.speaker = found["speaker"]
    # Where ranks differ, nothing was agreed that this one could differ from.
    problems = found["problems"] or _own_difference(rank, found["says"])
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        _Agreed.failure = (
            f"the {world} ranks do not all run the plugin alike, so training would hang or mix up gradients:\n"
            f"{listed}\nGive every rank the same installation and the same environment. {PREFIX}_AGREE_TIMEOUT (now "
            f"{registry.settings.agree_timeout:g}) is how many seconds a slow rank may take, and 0 compares nothing; "
            f"{PREFIX}_ON_MISMATCH=warn trains on as it is."
        )
    else:
        say(
            logging.INFO,
            f"megatron-fp32-router {__version__}: {found['line']}, protect={registry.settings.protect}",
            threshold=registry.settings.log,
        )


def _own_difference(rank: int, agreed: dict[str, str]) -> list[str]:
    """Where this rank is not what was agreed: it came after the verdict, and was judged by what it had said before."""
    return [
        f"{label} is {value} on rank {rank} (host {socket.gethostname()}) by now, but {agreed[label]} was agreed"
        for label, value in what_must_agree().items()
        if agreed.get(label, value) != value
    ]


def _attempt(step: Callable[[], None]) -> None:
    """Do what needs the store. A store that fails has lost its host, or somebody who was to answer."""
    try:
        step()
    except RuntimeError as error:
        _Agreed.group = weakref.ref(torch.distributed.group.WORLD)
        _Agreed.failure = (
            "the key-value store of the default process group failed while the ranks were compared: "
            f"{error}. The rank that hosts it may have ended; what it said is in its own log."
        )
        _judged()


def _is_agreed() -> bool:
    if _Agreed.group is None:
        return False
    group = torch.distributed.group.WORLD
    return group is not None and _Agreed.group() is group


# The places ------------------------------------------------------------------------------------------------------


def publish_when_wrapping(original: Callable[..., None]) -> Callable[..., None]:
    """DistributedDataParallel.__init__: this rank has a model now, whatever its precision, and says so.

    With NCCL's user buffers the constructor warms up with collectives, one round for each buffer: there the ranks
    agree first.
    """

    @replaces(original)
    def __init__(self: Any, config: Any, ddp_config: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        effect.seen.add(module)
        publish()
        if getattr(ddp_config, "nccl_ub", False):
            agree()
        original(self, config, ddp_config, module, *args, **kwargs)

    return __init__


def agree_first(original: Callable[..., Any]) -> Callable[..., Any]:
    """MegatronOptimizer.__init__ and DistributedDataParallel.broadcast_params: what comes before any step."""

    @replaces(original)
    def after_agreement(self: Any, *args: Any, **kwargs: Any) -> Any:
        agree()
        return original(self, *args, **kwargs)

    return after_agreement
