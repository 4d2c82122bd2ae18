"""How the results of all ranks reach the ranks that write: through the process group's own key-value store.

There is no collective, so the monitor can neither hang a rank nor mix up the training's own collectives. In a look
every rank stores a note: counts that have not been summed yet, and what is wrong with its tensors. One replica of each
pipeline stage, the one on rank 0's pipeline, reads the notes of its stage and stores the layers of the stage. The ranks
that write read those. A reader waits for a bounded time, and only where no rank waits for it. A rank that fails, or
waits too long, stores the reason. Readers see it at once, and from the next look on the monitor is off on all ranks. So
no rank waits twice.

Keys begin with the step as this process counts it, which is the same on every rank. The number in the file may differ:
only rank 0 knows after which step a restarted run goes on.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypedDict

import torch
import torch.distributed as dist

from megatron_fp32_router.balance.update import group_of
from megatron_fp32_router.log import rank
from megatron_fp32_router.monitor.look import Seen, counted
from megatron_fp32_router.monitor.sinks import NOT_FINITE, Entry, Layer
from megatron_fp32_router.ranks import agreement
from megatron_fp32_router.ranks.spans import ranks_text

_ROOM: Final = "megatron_fp32_router/monitor"
_ENDED: Final = "ended"
#: Seconds that a stage waits for its ranks. A rank that waits for a stage waits twice as long.
PATIENCE: Final = 60.0


def place() -> tuple[int, int, bool]:
    """(pipeline stage, number of stages, whether this rank speaks for its stage)."""
    state = _layout()
    if state is None:
        return 0, 1, rank() == 0
    speaks = (
        state.get_tensor_model_parallel_rank() == 0 and state.get_data_parallel_rank(with_context_parallel=True) == 0
    )
    return state.get_pipeline_model_parallel_rank(), state.get_pipeline_model_parallel_world_size(), speaks


def _layout() -> Any:
    state = sys.modules.get("megatron.core.parallel_state")
    there = state is not None and dist.is_initialized() and state.model_parallel_is_initialized()
    return state if there else None


def peers() -> list[int]:
    """The ranks of this pipeline stage: those whose tokens count in one balance update."""
    if not dist.is_initialized():
        return [rank()]
    return dist.get_process_group_ranks(dist.group.WORLD if _layout() is None else group_of(None))


def store() -> Any:
    """Our room in the store; None where no other rank could be met there."""
    return agreement.store(_ROOM)


# What is told ----------------------------------------------------------------------------------------------------


class Note(TypedDict):
    """What a rank tells its stage of one router."""

    #: Tokens of this rank per expert, where nobody has summed them: no expert biases, or a router in eval mode.
    counts: list[int] | None
    #: What is not finite, and broken promises: replicas are alike, unless something is wrong.
    not_finite: dict[str, float]
    violations: list[str]


def note(entries: Mapping[Layer, Entry], seen: Mapping[Layer, Seen]) -> dict[Layer, Note]:
    """What this rank has to tell of its own look."""
    return {
        layer: {
            "counts": None if each.reduced or each.counts_E is None else each.counts_E.tolist(),
            "not_finite": {
                name: value
                for name, value in entries[layer]["metrics"].items()
                if value and name.startswith(NOT_FINITE)
            },
            "violations": entries[layer]["violations"],
        }
        for layer, each in seen.items()
    }


def complete(
    entries: Mapping[Layer, Entry], seen: Mapping[Layer, Seen], notes: Mapping[int, Mapping[Layer, Note]], ranks: int
) -> None:
    """Add to `entries` what the notes say, and the numbers that need the counts of all ranks.

    Args:
        entries: of this rank.
        seen: what they were made of.
        notes: rank -> its note, of this stage; this rank's own among them.
        ranks: how many ranks count. Where some have not told their counts, no sum is made up.
    """
    for layer, each in seen.items():
        told = {number: found[layer] for number, found in notes.items() if layer in found}
        counts = [one["counts"] for one in told.values() if one["counts"] is not None]
        if not each.reduced and len(counts) == ranks:
            each.counts_E = torch.tensor([sum(column) for column in zip(*counts, strict=True)])
            each.reduced = True
        metrics, violations = entries[layer]["metrics"], entries[layer]["violations"]
        metrics |= counted(each)
        elsewhere: dict[str, list[int]] = {}
        for number, one in told.items():
            for name, value in one["not_finite"].items():
                metrics[name] = max(value, metrics.get(name, 0))
            for text in one["violations"]:
                if text not in violations:
                    elsewhere.setdefault(text, []).append(number)
        violations += [f"{text} ({ranks_text(numbers)})" for text, numbers in elsewhere.items()]


# The exchange ----------------------------------------------------------------------------------------------------


class Exchange:
    """One process's end of the exchange."""

    def __init__(self) -> None:
        self._posted: list[str] = []
        #: Why no rank looks any more, as far as this one has heard.
        self.ended: str | None = None

    def has_ended(self) -> bool:
        """Ask whether some rank has ended the monitor."""
        room = store()
        if self.ended is None and room is not None and room.check([_ENDED]):
            self.ended = room.get(_ENDED).decode()
        return self.ended is not None

    def end(self, why: str) -> bool:
        """End the monitor on all ranks. Whether the others can know."""
        self.ended = why
        room = store()
        if room is not None:
            room.set(_ENDED, why)
        return room is not None

    def begin(self) -> None:
        """Delete what this rank stored in the look before.

        All readers have read it: they needed it to get to this look.
        """
        for key in self._posted:
            store().delete_key(key)
        self._posted = []

    def post(self, look: int, name: str, value: Any) -> None:
        """Store `value`, plain lists and numbers, for the ranks that gather `name` in this look."""
        key = f"{look}/{name}"
        store().set(key, json.dumps(value))
        self._posted.append(key)

    def bring_together(
        self, look: int, own: dict[Layer, Entry], seen: Mapping[Layer, Seen], meet: bool, writes: bool
    ) -> dict[Layer, Entry]:
        """The layers of all stages on the ranks that write, those of this stage elsewhere.

        Args:
            look: its number.
            own: what this rank found, and gets what its stage adds.
            seen: what `own` was made of.
            meet: wait for other ranks.
            writes: whether this rank hands the look on.
        """
        stage, stages, speaks = place()
        notes, ranks, alone = {rank(): note(own, seen)}, peers(), store() is None
        if not alone:
            self.begin()
            # JSON would turn layer numbers into strings as keys of an object.
            self.post(look, f"rank {rank()}", list(notes[rank()].items()))
            if speaks and meet:
                told = self.gather(look, [f"rank {peer}" for peer in ranks], PATIENCE)
                notes = {int(name.split()[1]): dict(value) for name, value in told.items()}
        complete(own, seen, notes, len(ranks))
        if alone:
            return own
        if speaks:
            self.post(look, f"pipeline stage {stage}", list(own.items()))
        if not (writes and meet):
            return own
        told = self.gather(look, [f"pipeline stage {each}" for each in range(stages)], 2 * PATIENCE)
        return {layer: entry for entries in told.values() for layer, entry in entries}

    def gather(self, look: int, names: Sequence[str], patience: float) -> dict[str, Any]:
        """Name -> what was stored under it: all of them, or those that are there when waiting is given up."""
        room, keys = store(), [f"{look}/{name}" for name in names]
        found, until, pause = names, time.monotonic() + patience, 0.001
        # Polling, because a wait inside the store would lock out torch's own threads that use the same connection.
        while not room.check(keys):
            late = time.monotonic() > until
            if late or self.has_ended():
                found = [name for name, key in zip(names, keys, strict=True) if room.check([key])]
                missing = [name for name in names if name not in found]
                if late and missing:
                    listed = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
                    self.end(f"nothing was heard from {listed} for {patience:g} s")
                break
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        keys = [f"{look}/{name}" for name in found]
        values = room.multi_get(keys) if room.has_extended_api() else [room.get(key) for key in keys]
        return {name: json.loads(value) for name, value in zip(found, values, strict=True)}
