"""Everything in a checkpoint by its name, whichever format it has, read by the audit's readers: without Megatron."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_fp32_router.audit.dcp import DcpReader
from megatron_fp32_router.audit.files import Meter
from megatron_fp32_router.audit.main_copies import walk
from megatron_fp32_router.audit.pickles import TensorRef
from megatron_fp32_router.audit.torch_zip import Archive


def values(folder: Path) -> dict[str, Any]:
    """Name -> array or number: model, optimizer, scheduler and generators.

    The arguments of the command line, which are an object of their own, are left out.
    """
    meter, found = Meter(), {}
    if (folder / ".metadata").exists():
        reader = DcpReader(folder, meter)
        found |= {name: reader.read(name) for name in reader.tensors}
        for name in reader.objects:
            with reader.open_archive(name) as archive:
                found |= _in_archive(archive, name)
    for file in sorted(folder.rglob("*.pt")):
        with Archive(file, meter) as archive:
            found |= _in_archive(archive, str(file.relative_to(folder)))
    return found


def _in_archive(archive: Archive, name: str) -> dict[str, Any]:
    found = {}
    for path, value in walk(archive.root):
        if isinstance(value, TensorRef):
            value = archive.tensor(value)
        if isinstance(value, np.ndarray | int | float):
            found[".".join(map(str, (name, *path)))] = value
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what is not the same bit for bit, or not in both."""
    return sorted(name for name in one.keys() | other.keys() if _bits(one.get(name)) != _bits(other.get(name)))


def _bits(value: Any) -> tuple[Any, ...]:
    return (value.dtype, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else (type(value), value)
