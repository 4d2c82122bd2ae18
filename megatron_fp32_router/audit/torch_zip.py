"""torch's zip archives, read by byte range: `data.pkl` says what there is, `data/{key}` are raw elements."""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from megatron_fp32_router.audit.files import MAX_TENSOR, Meter, Window, unreadable
from megatron_fp32_router.audit.pickles import NUMPY_DTYPES, TensorRef, load

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

#: The pickle of a checkpoint with 100,000 tensors has about 30 MB.
MAX_PICKLE: Final = 1 << 27

_LOCAL_HEADER = struct.Struct("<4s22xHH")


class Archive:
    """One file, or one slice of a file, written by torch.save.

    Raises:
        CheckpointUnreadableError: not such an archive, or a damaged one.
    """

    def __init__(self, path: Path, meter: Meter, start: int = 0, length: int | None = None) -> None:
        self.path, self._meter = path, meter
        self._window = Window(path, meter, start, length)
        try:
            self._records = self._directory()
            self.root = self._load()
        except BaseException:
            self._window.close()
            raise

    def _directory(self) -> dict[str, zipfile.ZipInfo]:
        if self._window.exactly(0, min(4, self._window.length), "an archive") != b"PK\3\4":
            raise unreadable(
                self.path,
                "an archive as torch.save writes it since torch 1.6",
                "something else: truncated, garbled, or older; torch.load and torch.save make it new",
            )
        try:
            with zipfile.ZipFile(self._window) as archive:
                # "NAME/data.pkl": the first part depends on the file's name at the time of saving.
                return {info.filename.partition("/")[2]: info for info in archive.infolist()}
        except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, struct.error, UnicodeError) as error:
            raise unreadable(self.path, "a whole archive", f"a truncated or garbled one: {error}") from error

    def _load(self) -> Any:
        order = self._records.get("byteorder")
        if order is not None and self.read("byteorder", 0, min(order.file_size, 6)) != b"little":
            raise unreadable(self.path, "little-endian tensors", "another byte order")
        if "data.pkl" not in self._records:
            raise unreadable(self.path, "a record data.pkl", f"{len(self._records)} records without one")
        size = self._records["data.pkl"].file_size
        if size > MAX_PICKLE:
            raise unreadable(self.path, f"at most {MAX_PICKLE} bytes in data.pkl", size)
        return load(self.read("data.pkl", 0, size), self.path, "data.pkl")

    def read(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes of a record from `offset` on. The checksum is compared where that is the whole record."""
        info = self._records.get(name)
        if info is None:
            raise unreadable(self.path, f"a record {name}", "none")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise unreadable(self.path, f"{name} as torch.save stores it", "a compressed or encrypted record")
        if offset < 0 or size < 0 or offset + size > info.file_size:
            raise unreadable(self.path, f"{offset + size} bytes in {name}", info.file_size)
        header = self._window.exactly(info.header_offset, _LOCAL_HEADER.size, f"the header of {name}")
        magic, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        if magic != b"PK\3\4":
            raise unreadable(self.path, f"the header of {name}", "other bytes: garbled")
        data = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        read = self._window.exactly(data + offset, size, name)
        # 0: written under torch.serialization.set_crc32_options(False).
        if info.CRC and size == info.file_size and zlib.crc32(read) != info.CRC:
            raise unreadable(self.path, f"the checksum {info.CRC:08x} of {name}", f"{zlib.crc32(read):08x}: garbled")
        return read

    def tensor(self, ref: TensorRef, claimed: bool = False) -> NDArray[Any]:
        """A whole tensor, with its checksum checked where its storage holds nothing else.

        `claimed`: it is a piece of one whose size the meter knows.
        """
        dtype = NUMPY_DTYPES[ref.dtype]
        numel = math.prod(ref.shape)
        if not claimed:
            self._meter.claim(numel * dtype.itemsize, self.path, f"shape {ref.shape}")
        if max(ref.shape, default=0) > MAX_TENSOR:
            raise unreadable(self.path, f"a router's tensor of at most {MAX_TENSOR} bytes", f"shape {ref.shape}")
        extent = sum((n - 1) * s for n, s in zip(ref.shape, ref.stride, strict=True)) + 1 if 0 not in ref.shape else 0
        if extent * dtype.itemsize > MAX_TENSOR:
            raise unreadable(self.path, f"a router's tensor within {MAX_TENSOR} bytes", f"strides {ref.stride}")
        if numel > extent:
            # torch.save writes an expanded tensor like this. A few bytes of it could become a gigabyte here.
            raise unreadable(self.path, f"{numel} elements for shape {ref.shape}", f"{extent} that are repeated")
        flat = self._elements(ref, 0, extent)
        if _contiguous(ref):
            return flat.reshape(ref.shape)
        strides = tuple(s * dtype.itemsize for s in ref.stride)
        copy: NDArray[Any] = np.array(np.lib.stride_tricks.as_strided(flat, ref.shape, strides, writeable=False))
        return copy

    def span(self, ref: TensorRef, start: int, count: int) -> NDArray[Any]:
        """`count` elements in memory order from `start` on, of a contiguous tensor of any size: [count]."""
        if not _contiguous(ref):
            raise unreadable(self.path, "a contiguous tensor", f"strides {ref.stride}")
        return self._elements(ref, start, count)

    def _elements(self, ref: TensorRef, start: int, count: int) -> NDArray[Any]:
        dtype, first = NUMPY_DTYPES[ref.dtype], ref.offset + start
        if first + count > ref.storage.numel:
            raise unreadable(self.path, f"a tensor inside its {ref.storage.numel} elements", first + count)
        raw = self.read(f"data/{ref.storage.key}", first * dtype.itemsize, count * dtype.itemsize)
        elements: NDArray[Any] = np.frombuffer(raw, dtype=dtype)
        return elements

    def close(self) -> None:
        self._window.close()

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _contiguous(ref: TensorRef) -> bool:
    """Whether elements lie in memory in the order of their indices. Strides of axes of length 1 do not matter."""
    expected = 1
    for length, stride in zip(reversed(ref.shape), reversed(ref.stride), strict=True):
        if length != 1 and stride != expected:
            return 0 in ref.shape
        expected *= length
    return True
