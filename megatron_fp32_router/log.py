"""Messages: from one rank, and shown once, whether the program has configured logging or not."""

from __future__ import annotations

import logging
import os
import sys
from typing import Final

logger: Final = logging.getLogger("megatron_fp32_router")

#: Messages that are to be logged once in a process, and have been.
_said: set[str] = set()


def rank() -> int:
    """This process's global rank; 0 where nothing says otherwise.

    torch is asked only if the program has imported it: this runs at interpreter start-up too.
    """
    torch_distributed = sys.modules.get("torch.distributed")
    if torch_distributed is not None and torch_distributed.is_available() and torch_distributed.is_initialized():
        return int(torch_distributed.get_rank())
    value = os.environ.get("RANK", "0")
    return int(value) if value.isdigit() else 0


def say(level: int, message: str, *, threshold: str = "info", once: bool = False, speaker: int = 0) -> None:
    """Log `message` on rank 0, or on rank `speaker` where rank 0 cannot know it.

    Where a program has not configured logging, Python's root logger has no handler and is at WARNING, so an INFO
    record would be lost. There the line goes to standard error through a handler that is made for this one record:
    a later basicConfig() does not make everything appear twice.

    Args:
        threshold: MEGATRON_FP32_ROUTER_LOG. It is "warning" at most, so a warning need not name it.
        once: do not repeat a message in this process.
    """
    if level < logging.getLevelName(threshold.upper()) or rank() != speaker:
        return
    if once:
        if message in _said:
            return
        _said.add(message)
    # A level set on our logger by the user is respected; the root's is not, because it is not meant for us.
    if logger.level != logging.NOTSET and level < logger.level:
        return
    record = logger.makeRecord(logger.name, level, __file__, 0, message, (), None)
    if logger.hasHandlers():
        logger.handle(record)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        handler.handle(record)
