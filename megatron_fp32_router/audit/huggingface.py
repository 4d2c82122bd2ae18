"""Hugging Face checkpoints: safetensors, in one file or in shards that `model.safetensors.index.json` lists."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Final

from safetensors import SafetensorError, safe_open

from megatron_fp32_router.audit.files import Meter, inside, open_regular, read_json, unreadable
from megatron_fp32_router.audit.pickles import NUMPY_DTYPES
from megatron_fp32_router.audit.tensors import Checkpoint, RouterTensor, kind_of
from megatron_fp32_router.errors import CheckpointUnreadableError

if TYPE_CHECKING:
    from pathlib import Path

#: The index of a model with 100,000 tensors has about 10 MB.
MAX_INDEX: Final = 1 << 27

_DTYPES: Final = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip


def read_safetensors(folder: Path, files: list[Path], meter: Meter) -> Checkpoint:
    """Router tensors of some files, or of those that the folder's index names for routers.

    Raises:
        CheckpointUnreadableError: a file is damaged, or the index lists what is not there.
    """
    index = folder / "model.safetensors.index.json"
    expected: dict[Path, set[str]] = {file: set() for file in files}
    checkpoint = Checkpoint(folder, "safetensors")
    if not files:
        for name, file in read_index(index, meter)["weight_map"].items():
            checkpoint.note_layer(name)
            if kind_of(name, hugging_face=True) is not None:
                expected.setdefault(inside(folder, file, index), set()).add(name)
    for file in sorted(expected):
        tensors = _read_file(file, meter, checkpoint)
        lacking = expected[file] - {tensor.name for tensor in tensors}
        if lacking:
            raise unreadable(file, f"{min(lacking)}, as {index.name} says", "a file without it")
        checkpoint.tensors += tensors
    return checkpoint


def read_index(path: Path, meter: Meter) -> dict[str, Any]:
    """A model.safetensors.index.json, which has a weight_map.

    Raises:
        CheckpointUnreadableError: it has none, or is no JSON.
    """
    root = read_json(path, meter, MAX_INDEX)
    if not isinstance(root, dict) or not isinstance(root.get("weight_map"), dict):
        raise unreadable(path, "a weight_map", "none")
    return root


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a safetensors file begin, in bytes, and what its header says about each.

    Raises:
        CheckpointUnreadableError: the header is damaged, or the file is not as long as it says.
    """
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            with safe_open(path, framework="numpy"):
                return 8 + length, json.loads(file.read(length))
        except SafetensorError as error:
            raise CheckpointUnreadableError(f"{path}: not a whole safetensors file: {error}") from error


def _read_file(path: Path, meter: Meter, checkpoint: Checkpoint) -> list[RouterTensor]:
    meter.file = path
    with open_regular(path) as file:
        header = file.read(8)
    found = []
    try:
        with safe_open(path, framework="numpy") as file:
            meter.add(8 + int.from_bytes(header, "little"), path.name)
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                kind = kind_of(name, hugging_face=True)
                if kind is None:
                    checkpoint.note_layer(name)
                    continue
                part = file.get_slice(name)
                shape, dtype = tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype())
                size = math.prod(shape) * (NUMPY_DTYPES[dtype].itemsize if dtype in NUMPY_DTYPES else 1)
                meter.claim(size, path, f"{name}, shape {shape}")
                # safetensors cannot give 8-bit floats to NumPy, and their dtype alone is the answer.
                values = None if dtype.startswith("float8") or dtype not in NUMPY_DTYPES else file.get_tensor(name)
                meter.add(size if values is not None else 0, path.name)
                found.append(RouterTensor(name, kind, dtype, shape, values))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointUnreadableError(f"{path}: not a whole safetensors file: {error}") from error
    return found
