"""Messages: rank 0 only, seen once, in a program that configured logging and in one that never did."""

from __future__ import annotations

import logging
import os
import sys
from typing import Final

logger: Final = logging.getLogger("megatron_fp32_router")

#: Sentences already said; each warning is said once in a process.
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
    """Log `message` on rank 0, or on rank `speaker` where rank 0 cannot know.

    Python's root logger sits at WARNING and has no handler in a program that never configured logging: an INFO
    record would vanish. There the line goes to standard error through a handler that exists for this one record,
    so that a later basicConfig() does not make everything appear twice.
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
