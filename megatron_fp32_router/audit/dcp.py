"""torch.distributed.checkpoint (DCP): `.metadata` says which bytes of which `.distcp` file hold which tensor.

Megatron's torch_dist and fsdp_dtensor formats are DCP. torch_dist also stores what is no tensor (iteration, arguments),
and homogeneous layers as one tensor. Every item in a `.distcp` file is an archive of its own, as torch.save writes it.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from megatron_fp32_router.audit.files import Meter, inside, read_small, shown, unreadable
from megatron_fp32_router.audit.main_copies import Flat, Piece, buffers_in
from megatron_fp32_router.audit.pickles import NUMPY_DTYPES, Dtype, Opaque, TensorRef, load
from megatron_fp32_router.audit.tensors import PARAMETERS, Checkpoint, RouterTensor, kind_of, read_arguments
from megatron_fp32_router.audit.torch_zip import Archive

if TYPE_CHECKING:
    from contextlib import ExitStack
    from pathlib import Path

    from numpy.typing import NDArray

#: `.metadata` has about 100 bytes for every piece of every tensor, so this is enough for two million pieces.
MAX_METADATA: Final = 1 << 28

#: A main copy in the formats whose optimizer state names the parameter.
_NAMED_MAIN: Final = (
    re.compile(r"^(?:.*\.)?optimizer\.state\.(?:fp32_param|param|master_param|main_param)\.(?P<of>.+)$"),
    re.compile(r"^(?:.*\.)?optimizer\.state\.(?P<of>.+)\.(?:fp32_param|param|master_param|main_param)$"),
)

#: An object (dp_zero_gather_scatter) or a buffer (dp_reshardable) with main copies of many parameters, without names.
_OBJECT_MAIN: Final = re.compile(r"^(?:.*\.)?optimizer\.distributed\..*\.param_state/shard_\d+_\d+$")
_FLAT_MAIN: Final = re.compile(r"^(?:.*\.)?optimizer\.distributed\..*gbuf_idx_\d+\..*\.(?:param|master_param)$")


class DcpReader:
    """What `.metadata` says about the tensors of a folder; `read` fetches the values of one.

    Raises:
        CheckpointUnreadableError: `.metadata` is damaged or not DCP's.
    """

    def __init__(self, folder: Path, meter: Meter) -> None:
        self.folder, self.meter, self.path = folder, meter, folder / ".metadata"
        data = read_small(self.path, meter, MAX_METADATA)
        root = load(data, self.path, "DCP's metadata", lambda: meter.add(0, ".metadata"))
        # MCoreMetadata: a subclass in Megatron 0.15 to 0.19, which 0.15 writes.
        if not isinstance(root, Opaque) or root.of.rpartition(".")[2] not in ("Metadata", "MCoreMetadata"):
            raise unreadable(self.path, "DCP's Metadata", type(root).__name__)
        tensors, where = root.field("state_dict_metadata"), root.field("storage_data")
        if not isinstance(tensors, dict) or not isinstance(where, dict):
            raise unreadable(self.path, "state_dict_metadata and storage_data", "a Metadata without them")
        named = {name: e for name, e in tensors.items() if isinstance(name, str) and isinstance(e, Opaque)}
        self.tensors = {name: entry for name, entry in named.items() if entry.of.endswith(".TensorStorageMetadata")}
        #: Whole objects that torch.save wrote, not tensors.
        self.objects = sorted(name for name, entry in named.items() if entry.of.endswith(".BytesStorageMetadata"))
        self._where: dict[tuple[str, tuple[int, ...] | None], Opaque] = {}
        for index, info in where.items():
            if isinstance(index, Opaque) and isinstance(info, Opaque):
                name, offset = index.field("fqn"), index.field("offset")
                if isinstance(name, str) and isinstance(offset, tuple | None):
                    self._where[name, None if offset is None else self._naturals(name, offset)] = info

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(dtype, shape)."""
        entry = self.tensors[name]
        properties = entry.field("properties")
        state = properties.state if isinstance(properties, Opaque) else None
        # A tuple, or a dictionary in torch before 2.1.
        dtype = (
            state[0] if isinstance(state, tuple) and state else state.get("dtype") if isinstance(state, dict) else None
        )
        shape = entry.field("size")
        if not isinstance(dtype, Dtype) or not isinstance(shape, tuple) or len(shape) > 8:
            raise unreadable(self.path, f"dtype and shape of {name}", shown((dtype, shape)))
        shape = self._naturals(name, shape)
        if 0 in shape:
            raise unreadable(self.path, f"elements in {name}", f"shape {shape}")
        return dtype.name, shape

    def chunks(self, name: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(offset, shape) of the pieces in which a tensor is stored."""
        entries, found = self.tensors[name].field("chunks"), []
        for entry in entries if isinstance(entries, list) else []:
            offsets = entry.field("offsets") if isinstance(entry, Opaque) else None
            sizes = entry.field("sizes") if isinstance(entry, Opaque) else None
            if not isinstance(offsets, tuple) or not isinstance(sizes, tuple) or len(offsets) != len(sizes):
                raise unreadable(self.path, f"pieces of {name}", shown((offsets, sizes)))
            found.append((self._naturals(name, offsets), self._naturals(name, sizes)))
        # A planner that keeps replicas lists a piece once for each rank, and stores it in one place.
        return list(dict.fromkeys(found))

    def _naturals(self, name: str, values: tuple[Any, ...]) -> tuple[int, ...]:
        if len(values) > 8 or any(type(value) is not int or not 0 <= value < 1 << 62 for value in values):
            raise unreadable(self.path, f"sizes of {name}", shown(values))
        return values

    def open_archive(self, name: str, offset: tuple[int, ...] | None = None) -> Archive:
        """The archive, open, that holds an object, or the piece of a tensor at `offset`."""
        info = self._where.get((name, offset))
        if info is None:
            raise unreadable(self.path, f"where {name} at {offset} is stored", "nothing: unknown or damaged layout")
        start, length = info.field("offset"), info.field("length")
        if info.field("transform_descriptors"):
            raise unreadable(self.path, f"{name} stored as it is", "a compressed or otherwise transformed piece")
        if type(start) is not int or type(length) is not int:
            raise unreadable(self.path, f"the place of {name}", shown((start, length)))
        return Archive(inside(self.folder, info.field("relative_path"), self.path), self.meter, start, length)

    def open_chunk(self, name: str, offset: tuple[int, ...]) -> tuple[Archive, TensorRef]:
        """The archive that holds one piece, open, and the tensor in it."""
        archive = self.open_archive(name, offset)
        if not isinstance(archive.root, TensorRef):
            archive.close()
            raise unreadable(archive.path, f"the tensor {name}", type(archive.root).__name__)
        return archive, archive.root

    def read(self, name: str) -> NDArray[Any]:
        """A router's tensor, put together from its pieces."""
        dtype, shape = self.describe(name)
        numpy_dtype = NUMPY_DTYPES[dtype]
        self.meter.claim(math.prod(shape) * numpy_dtype.itemsize, self.path, f"{name}, shape {shape}")
        self._stored(name, shape, numpy_dtype.itemsize)
        whole, seen = np.empty(shape, numpy_dtype), np.zeros(shape, bool)
        for offset, size in self.chunks(name):
            box = tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))
            if len(box) != len(shape) or any(o + s > n for o, s, n in zip(offset, size, shape, strict=True)):
                raise unreadable(self.path, f"pieces of {name} inside {shape}", f"{size} at {offset}")
            archive, ref = self.open_chunk(name, offset)
            with archive:
                if ref.shape != size or ref.dtype != dtype:
                    raise unreadable(archive.path, f"{dtype} {size} for {name}", f"{ref.dtype} {ref.shape}")
                whole[box] = archive.tensor(ref, claimed=True)
            seen[box] = True
        if not seen.all():
            raise unreadable(self.path, f"all of {name}", f"{int(seen.sum())} of {seen.size} elements")
        return whole

    def _stored(self, name: str, shape: tuple[int, ...], itemsize: int) -> None:
        """Compare what a tensor claims with what its pieces and files can hold, before memory for it is taken."""
        held, numel = 0, math.prod(shape)
        for offset, size in self.chunks(name):
            info = self._where.get((name, offset))
            length = None if info is None else info.field("length")
            if info is not None and info.field("transform_descriptors"):
                held += math.prod(size)  # compressed: `open_archive` refuses it, with a better reason
            elif info is not None and type(length) is int:
                file = inside(self.folder, info.field("relative_path"), self.path)
                held += min(length, file.stat().st_size) // itemsize if file.is_file() else math.prod(size)
        pieces = sum(math.prod(size) for _, size in self.chunks(name))
        if pieces < numel:
            raise unreadable(self.path, f"all of {name}", f"{pieces} of {numel} elements")
        if pieces > 2 * numel:
            raise unreadable(self.path, f"each element of {name} once", f"{pieces} elements for {numel}")
        if held < numel:
            raise unreadable(self.path, f"{numel} elements of {name} in its files", f"room for {held}: truncated?")


def read_dcp(folder: Path, meter: Meter, stack: ExitStack) -> tuple[Checkpoint, list[Flat]]:
    """Router tensors with the main copies that have a name, and the buffers that may hold other main copies.

    Archives that are needed to read these buffers stay open in `stack`.
    """
    reader = DcpReader(folder, meter)
    checkpoint = Checkpoint(folder, "torch_dist (DCP)" if (folder / "metadata.json").exists() else "DCP")
    mains = {}
    for name in reader.tensors:
        for pattern in _NAMED_MAIN:
            found = pattern.match(name)
            if found is not None and kind_of(found["of"]) in PARAMETERS:
                mains[found["of"]] = name
    for name in sorted(reader.tensors):
        kind = kind_of(name)
        if kind is None or name in mains.values() or re.search(r"(?:^|\.)optimizer\.", name):
            continue
        dtype, shape = reader.describe(name)
        tensor = RouterTensor(name, kind, dtype, shape, reader.read(name))
        # With FSDP, the model's names have a prefix for its wrappers; the optimizer's have none.
        main = mains.get(name) or next((m for of, m in mains.items() if name.endswith("." + of)), None)
        if main is not None:
            copy = _unflattened(reader.read(main), shape)
            if copy.shape == shape and copy.dtype in (np.float32, np.float64):
                tensor = replace(tensor, main=copy, main_from=main)
            else:
                holds = f"{copy.dtype} {copy.shape}"
                checkpoint.notes.append(
                    f"{main} is no main copy that can be used: expected fp32 {shape}, found {holds}"
                )
        checkpoint.tensors.append(tensor)
    _read_common(reader, checkpoint)
    buffers = [_flat(reader, name) for name in sorted(reader.tensors) if _FLAT_MAIN.match(name)]
    for name in filter(_OBJECT_MAIN.match, reader.objects):
        archive = stack.enter_context(reader.open_archive(name))
        buffers += buffers_in(archive, archive.root)
    return checkpoint, buffers


def _read_common(reader: DcpReader, checkpoint: Checkpoint) -> None:
    """Read iteration and arguments. torch_dist has them in an object from 0.19 on, before in a file `common.pt`.

    torch_dcp and fsdp_dtensor give the whole state to DCP, which makes an object of each entry.
    """
    parts: dict[Any, Any] = {}
    for name in ("args", "iteration"):
        if name in reader.objects:
            with reader.open_archive(name) as archive:
                parts[name] = archive.root
    read_arguments(checkpoint, parts)
    common, file = "common_state/shard_0_1", reader.folder / "common.pt"
    if common in reader.objects:
        archive = reader.open_archive(common)
    elif file.exists():
        archive = Archive(file, reader.meter)
    else:
        return
    with archive:
        # Megatron saves the object in a list.
        root = archive.root[0] if isinstance(archive.root, list) and archive.root else archive.root
        if isinstance(root, dict):
            read_arguments(checkpoint, root)


def _unflattened(copy: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Undo what Megatron up to 0.15 does to main copies in fully_sharded_model_space.

    It stores [layers, experts, hidden] as [layers, 1, 1, experts * hidden]. The ones say into how many pieces tensor
    parallelism cuts each axis, and it never cuts a router's.
    """
    front = tuple(length for length in copy.shape[:-1] if length != 1)
    if copy.ndim == len(shape) + 1 and copy.size == math.prod(shape) and shape[: len(front)] == front:
        return copy.reshape(shape)
    return copy


def _flat(reader: DcpReader, name: str) -> Flat:
    dtype, shape = reader.describe(name)
    if len(shape) != 1:
        return Flat(name, dtype, [])

    def piece(offset: tuple[int, ...], size: tuple[int, ...]) -> Piece:
        def read(start: int, count: int) -> NDArray[Any]:
            archive, ref = reader.open_chunk(name, offset)
            with archive:
                if ref.shape != size:
                    raise unreadable(archive.path, f"{size} elements of {name}", ref.shape)
                return archive.span(ref, start, count)

        return Piece(size[0], read)

    return Flat(name, dtype, [piece(offset, size) for offset, size in sorted(reader.chunks(name)) if len(size) == 1])
