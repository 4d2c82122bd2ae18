"""Read files of unknown origin: only regular files of the checkpoint, in pieces of bounded size, which are counted."""

from __future__ import annotations

import itertools
import json
import os
import stat
from contextlib import closing
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from megatron_fp32_router.errors import CheckpointUnreadableError

if TYPE_CHECKING:
    from collections.abc import Callable

#: The most bytes in one read, whatever a header says. The directory of an archive with 500,000 entries is smaller.
MAX_READ: Final = 1 << 26

#: Bytes of the largest tensor that can be a router's. DeepSeek-V3's 61 layers in one tensor would be 450 MB of fp32.
MAX_TENSOR: Final = 1 << 30

#: Bytes of optimizer buffers without names that are searched for main copies, unless told otherwise.
SEARCH_LIMIT: Final = 2 << 30

#: Bytes of all router tensors of a checkpoint with their main copies: about five times DeepSeek-V3's.
MAX_TOTAL: Final = 4 << 30

#: How many router tensors a checkpoint may have: ten times those of a thousand layers with ten tensors each.
MAX_TENSORS: Final = 100_000


def unreadable(path: Path | str, expected: str, found: object) -> CheckpointUnreadableError:
    """The error for a file that is not what it should be."""
    return CheckpointUnreadableError(f"{path}: expected {expected}, found {found}")


def shown(value: object, depth: int = 3) -> str:
    """A value from a file in at most 200 characters, without looking at more of it than it shows.

    `repr` of a list in a list in a list may be longer than the memory, and of an integer longer than Python allows.
    """
    if isinstance(value, int):
        text = repr(value) if value.bit_length() <= 128 else f"an integer of {value.bit_length()} bits"
    elif isinstance(value, str | bytes):
        text = repr(value[:100]) + ("…" if len(value) > 100 else "")
    elif value is None or isinstance(value, float):
        text = repr(value)
    elif isinstance(value, tuple | list | dict | set | frozenset):
        first = ", ".join(shown(item, depth - 1) for item in itertools.islice(value, 6)) if depth else "…"
        text = f"{type(value).__name__} of {len(value)}: {first}" if value else f"an empty {type(value).__name__}"
    else:
        text = str(getattr(value, "of", "") or type(value).__name__)
    return text[:200]


def inside(folder: Path, name: object, where: Path) -> Path:
    """The path of file `name`, as named by the file `where`, below `folder`.

    Raises:
        CheckpointUnreadableError: the name is absolute, climbs out of the folder, or is no name at all.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise unreadable(where, "the name of a file of this checkpoint", shown(name))
    # Judged by the rules of POSIX and of Windows, so that the answer is the same on every machine.
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or ".." in parts:
        raise unreadable(where, "the name of a file inside the checkpoint's folder", shown(name))
    return folder / name


class Meter:
    """Counts the bytes that were read, and calls `progress` with their number."""

    def __init__(self, progress: Callable[[int, str], None] | None = None) -> None:
        self.bytes = 0
        #: The file that was opened last: where a failure is most likely to come from.
        self.file: Path | None = None
        self._claimed = self._tensors = 0
        self._progress = progress

    def add(self, size: int, what: str) -> None:
        """`size` more bytes were read, of the file or tensor `what`."""
        self.bytes += size
        if self._progress is not None:
            self._progress(self.bytes, what)

    def claim(self, size: int, path: Path, what: str) -> None:
        """Call this before memory for one more router tensor of `size` bytes is taken.

        Raises:
            CheckpointUnreadableError: it, or all of them together, are larger than any router's.
        """
        if size > MAX_TENSOR:
            raise unreadable(path, f"a router's tensor of at most {MAX_TENSOR} bytes", what)
        self._claimed += size
        self._tensors += 1
        if self._claimed > MAX_TOTAL:
            raise unreadable(path, f"at most {MAX_TOTAL} bytes of router tensors in a checkpoint", what)
        if self._tensors > MAX_TENSORS:
            raise unreadable(path, f"at most {MAX_TENSORS} router tensors in a checkpoint", what)


class Window:
    """`length` bytes of a file from `start` on, to read and to seek in, as zipfile does. What is read is counted.

    Raises:
        CheckpointUnreadableError: no regular file, or one that is too short.
    """

    def __init__(self, path: Path, meter: Meter, start: int = 0, length: int | None = None) -> None:
        self.path, self._meter, meter.file = path, meter, path
        self._file = open_regular(path)
        try:
            size = os.fstat(self._file.fileno()).st_size
            length = size - start if length is None else length
            if start < 0 or length < 0 or start + length > size:
                raise unreadable(path, f"{length} bytes from byte {start} on", f"{size} bytes: truncated?")
        except BaseException:
            self._file.close()
            raise
        self.start, self.length, self._at = start, length, 0

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise OSError(f"seek before the start of {self.path}")
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.length - self._at)
        size = left if size < 0 else min(size, left)
        if size > MAX_READ:
            raise unreadable(self.path, f"pieces of at most {MAX_READ} bytes", f"one of {size}")
        self._file.seek(self.start + self._at)
        data = self._file.read(size)
        self._at += len(data)
        self._meter.add(len(data), self.path.name)
        return data

    def exactly(self, offset: int, size: int, what: str) -> bytes:
        """`size` bytes from `offset` on, or an error that names `what`; sizes above MAX_READ come in pieces."""
        if offset < 0 or size < 0 or offset + size > self.length:
            raise unreadable(self.path, f"{size} bytes of {what} at byte {offset}", f"{self.length} bytes: truncated?")
        self.seek(offset)
        data = b"".join([self.read(min(MAX_READ, size - done)) for done in range(0, size, MAX_READ)])
        if len(data) != size:
            raise unreadable(self.path, f"{size} bytes of {what}", len(data))
        return data

    def close(self) -> None:
        self._file.close()


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; a folder, pipe or device is refused before it can block."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise unreadable(path, "a regular file", "a folder" if stat.S_ISDIR(mode) else "something else")
        return path.open("rb", buffering=0)
    except (OSError, ValueError) as error:
        raise CheckpointUnreadableError(f"{path}: cannot be opened: {error}") from error


def read_json(path: Path, meter: Meter, limit: int) -> Any:
    """What a JSON file of at most `limit` bytes holds."""
    try:
        return json.loads(read_small(path, meter, limit))
    except (ValueError, RecursionError) as error:
        raise unreadable(path, "JSON", f"{type(error).__name__}: {error}") from error


def read_small(path: Path, meter: Meter, limit: int) -> bytes:
    """A whole file, of at most `limit` bytes."""
    with closing(Window(path, meter)) as window:
        if window.length > limit:
            raise unreadable(path, f"at most {limit} bytes", window.length)
        return window.exactly(0, window.length, "the file")
