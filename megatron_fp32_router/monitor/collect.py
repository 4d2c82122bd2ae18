"""How layers of other pipeline stages reach the ranks that write: through the process group's own key-value store.

No collective: nothing can wait for a rank that does not come. Only one replica of every stage speaks, the one on rank
0's pipeline; a violation is told by whichever rank sees it. Keys carry the number of the look in this process, which
is the same on every rank, and not the step, which rank 0 may know better.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Final

import torch.distributed as dist

from megatron_fp32_router.monitor.sinks import Entry
from megatron_fp32_router.registry import registry
from megatron_fp32_router.say import rank, say

_KEY: Final = "megatron_fp32_router/monitor"
#: Seconds that a writing rank waits for a stage. A stage that is late once is not waited for as long again.
_PATIENCE: Final = 60.0
_IMPATIENCE: Final = 1.0


def place() -> tuple[int, int, bool]:
    """(pipeline stage, number of stages, whether this rank speaks for its stage)."""
    state = sys.modules.get("megatron.core.parallel_state")
    if state is None or not dist.is_initialized() or not state.model_parallel_is_initialized():
        return 0, 1, rank() == 0
    speaks = (
        state.get_tensor_model_parallel_rank() == 0 and state.get_data_parallel_rank(with_context_parallel=True) == 0
    )
    return state.get_pipeline_model_parallel_rank(), state.get_pipeline_model_parallel_world_size(), speaks


class Exchange:
    """One process's end of the exchange."""

    def __init__(self) -> None:
        self._patience = _PATIENCE
        self._read = 0
        self._mine: str | None = None

    def post(self, look: int, stage: int, entries: dict[int | str, Entry]) -> None:
        """Lay this stage's layers out for the ranks that write, and take the last look's away.

        Every reader has read those: no stage gets from one look to the next without all others.
        """
        store = _store()
        if self._mine is not None:
            store.delete_key(self._mine)
        self._mine = f"{_KEY}/{look}/{stage}"
        # JSON would turn layer numbers into strings as keys of an object.
        store.set(self._mine, json.dumps(list(entries.items())))

    def collect(self, look: int, stages: int) -> Iterator[tuple[int | str, Entry]]:
        """The layers of all stages, in order."""
        store = _store()
        for stage in range(stages):
            key = f"{_KEY}/{look}/{stage}"
            try:
                store.wait([key], timedelta(seconds=self._patience))
            except (RuntimeError, dist.DistStoreError) as error:
                say(
                    logging.WARNING,
                    f"the monitor heard nothing from pipeline stage {stage} for {self._patience:g} s "
                    f"({type(error).__name__}); its layers are missing from the report",
                    threshold=registry.settings.log,
                    once=True,
                )
                self._patience = _IMPATIENCE
                continue
            yield from json.loads(store.get(key))

    def complain(self, layer: int | str, text: str) -> None:
        """Tell rank 0 of a violation that it might not see: on a rank that does not speak for its stage."""
        store = _store()
        number = store.add(f"{_KEY}/violations", 1)
        store.set(f"{_KEY}/violation/{number}", json.dumps([layer, f"{text} (rank {rank()})"]))

    def complaints(self) -> Iterator[tuple[int | str, str]]:
        """What other ranks have complained about since the last call; the slowest may be a look late."""
        store = _store()
        total = store.add(f"{_KEY}/violations", 0)
        while self._read < total:
            key = f"{_KEY}/violation/{self._read + 1}"
            if not store.check([key]):
                return  # counted, and not yet written: next time
            self._read += 1
            layer, text = json.loads(store.get(key))
            yield layer, text


def _store() -> Any:
    # The one that init_process_group made: TCPStore under torchrun, whatever a test was given otherwise.
    return dist.distributed_c10d._get_default_store()
