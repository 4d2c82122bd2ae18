"""Find main copies that have no name in the optimizer's buffers: by the values that they round to.

The distributed optimizer's flat formats (dp_reshardable, distrib_optim.pt) and the legacy optimizer state hold fp32
copies of all parameters, and do not say which copy is of which parameter. If the elements of a copy round to those of a
router's weight, it is the copy of that weight: with hundreds of different values this cannot be chance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from megatron_fp32_router.audit import bits
from megatron_fp32_router.audit.pickles import NUMPY_DTYPES, TensorRef
from megatron_fp32_router.audit.tensors import PARAMETERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from megatron_fp32_router.audit.tensors import Checkpoint, RouterTensor
    from megatron_fp32_router.audit.torch_zip import Archive

#: Elements that are read and compared at a time: 64 MB of fp32.
_BLOCK: Final = 1 << 24

#: The most containers that `walk` looks into; a real checkpoint has thousands.
_MAX_NODES: Final = 2_000_000

#: A weight with fewer different values could be confused with another.
_ENOUGH: Final = 16


@dataclass(frozen=True)
class Piece:
    """A run of `numel` elements; `read(start, count)` gives some of them."""

    numel: int
    read: Callable[[int, int], NDArray[Any]]


@dataclass(frozen=True)
class Flat:
    """A buffer of main copies: its name, dtype and pieces in order. `shape`: set when it is one parameter's copy."""

    name: str
    dtype: str
    pieces: list[Piece]
    shape: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return sum(piece.numel for piece in self.pieces) * NUMPY_DTYPES[self.dtype].itemsize


def find(checkpoint: Checkpoint, buffers: Sequence[Flat], limit: int) -> None:
    """Give low-precision weights the main copies that `buffers` hold, reading at most `limit` bytes of them."""
    wanted = {
        index: tensor
        for index, tensor in enumerate(checkpoint.tensors)
        if tensor.main is None
        and tensor.kind in PARAMETERS
        and tensor.dtype in bits.CASTS
        and tensor.values is not None
        and bits.distinct(tensor.values) >= _ENOUGH
    }
    left = limit
    skipped = 0
    # Copies of a single parameter come first: their shape says whether they need to be read.
    for buffer in sorted(buffers, key=lambda b: b.shape is None):
        fits = {index: tensor for index, tensor in wanted.items() if buffer.shape in (None, tensor.shape)}
        if not fits:
            continue
        if buffer.dtype != "float32":
            # int16: TransformerEngine's store_param_remainders, the low halves of fp32 values.
            checkpoint.notes.append(f"{buffer.name} holds main copies as {buffer.dtype}: not searched")
            continue
        if buffer.nbytes > left:
            skipped += buffer.nbytes
            continue
        left -= buffer.nbytes
        for index, copy in _search(buffer, fits).items():
            checkpoint.tensors[index] = replace(wanted.pop(index), main=copy, main_from=buffer.name)
    if skipped and wanted:
        checkpoint.notes.append(
            f"main copies of {len(wanted)} tensors may lie in optimizer buffers that do not name them; "
            f"{skipped / 1e9:.1f} GB of these were not searched (--search-limit)"
        )


def _search(buffer: Flat, wanted: dict[int, RouterTensor]) -> dict[int, NDArray[Any]]:
    """The copy of each wanted tensor that lies in the buffer, by the tensor's index. The buffer is read once."""
    found: dict[int, NDArray[Any]] = {}
    patterns = {index: tensor.values.reshape(-1) for index, tensor in wanted.items() if tensor.values is not None}
    overlap = max(pattern.size for pattern in patterns.values()) - 1
    tail = np.empty(0, np.float32)
    for block in _blocks(buffer):
        joined = np.concatenate([tail, block])
        rounded = {dtype: _bits(bits.rounded(joined, dtype)) for dtype in {p.dtype for p in patterns.values()}}
        for index, pattern in patterns.items():
            if index in found:
                continue
            needle, hay = _bits(pattern), rounded[pattern.dtype]
            # Searching for the rarest value would be quicker, but even the first one is found in few places.
            for start in np.flatnonzero(hay[: max(0, hay.size - needle.size + 1)] == needle[0]).tolist():
                if np.array_equal(hay[start : start + needle.size], needle):
                    found[index] = joined[start : start + needle.size].reshape(wanted[index].shape).copy()
                    break
        tail = joined[-overlap:]
    return found


def _blocks(buffer: Flat) -> Iterator[NDArray[Any]]:
    for piece in buffer.pieces:
        for start in range(0, piece.numel, _BLOCK):
            yield piece.read(start, min(_BLOCK, piece.numel - start))


def _bits(values: NDArray[Any]) -> NDArray[np.uint16]:
    return np.ascontiguousarray(values).view(np.uint16)


def walk(root: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value below `root` with its path; a container that is reached twice is looked into once."""
    todo: list[tuple[tuple[Any, ...], Any]] = [((), root)]
    seen: set[int] = set()
    while todo:
        path, value = todo.pop()
        yield path, value
        if not isinstance(value, dict | list | tuple) or id(value) in seen or len(path) > 64:
            continue
        seen.add(id(value))
        if len(seen) > _MAX_NODES:
            return
        items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        todo += [((*path, key), item) for key, item in reversed(items)]


def buffers_in(archive: Archive, root: Any) -> Iterator[Flat]:
    """What may hold main copies in an optimizer's state: fp32_from_fp16_params (one per parameter),
    and `param` of the distributed optimizer's flat buffers. The archive must stay open while they are searched."""
    for path, value in walk(root):
        if not isinstance(value, TensorRef):
            continue
        listed, flat = "fp32_from_fp16_params" in path, path[-1:] == ("param",) and len(value.shape) == 1
        if not listed and not flat:
            continue
        name = f"{archive.path.name}: " + ".".join(str(p) if not isinstance(p, tuple) else "dtype" for p in path)
        piece = Piece(math.prod(value.shape), partial(archive.span, value))
        yield Flat(name, value.dtype, [piece], value.shape if listed else None)
