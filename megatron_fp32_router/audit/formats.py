"""`open_checkpoint`: finds out which format a checkpoint has, and calls the reader for it."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

from megatron_fp32_router.audit import main_copies
from megatron_fp32_router.audit.dcp import read_dcp
from megatron_fp32_router.audit.files import SEARCH_LIMIT, Meter, read_small, unreadable
from megatron_fp32_router.audit.huggingface import read_safetensors
from megatron_fp32_router.audit.legacy import read_legacy
from megatron_fp32_router.audit.tensors import Checkpoint, unstack
from megatron_fp32_router.errors import CheckpointUnreadableError

if TYPE_CHECKING:
    from collections.abc import Callable

_ITERATION: Final = re.compile(r"^iter_(\d{1,12})$")


def open_checkpoint(
    path: str | Path,
    *,
    search_limit: int = SEARCH_LIMIT,
    progress: Callable[[int, str], None] | None = None,
) -> Checkpoint:
    """Read the router tensors of a checkpoint.

    Args:
        path: a folder with one checkpoint, the folder above with `latest_checkpointed_iteration.txt` or `iter_…`
            folders (the last is read), a `.safetensors` file, or a `model_optim_rng.pt`.
        search_limit: bytes of optimizer buffers without names that may be read to find main copies.
        progress: called with the bytes read so far and the name of the file.

    Raises:
        CheckpointUnreadableError: nothing there is a checkpoint, or a file of it is damaged.
    """
    meter = Meter(progress)
    try:
        with ExitStack() as stack:
            checkpoint, buffers = _read(Path(path), meter, stack)
            checkpoint.tensors = [part for tensor in checkpoint.tensors for part in unstack(tensor)]
            main_copies.find(checkpoint, buffers, search_limit)
    except (CheckpointUnreadableError, ImportError):
        raise
    except OSError as error:
        raise CheckpointUnreadableError(f"{meter.file or path}: cannot be read: {error}") from error
    except Exception as error:
        # A file of unknown origin can lead to any error: MemoryError, OverflowError, RecursionError and UnicodeError
        # have all been seen. With a traceback the exit code would be 1, which says that routers have a problem.
        raise CheckpointUnreadableError(
            f"{meter.file or path}: cannot be read: {type(error).__name__}: {str(error)[:200]}"
        ) from error
    named = _ITERATION.match(checkpoint.path.name)
    if checkpoint.iteration is None and named is not None:
        checkpoint.iteration = int(named[1])
    checkpoint.tensors.sort(key=lambda tensor: (tensor.key, tensor.name))
    checkpoint.bytes_read = meter.bytes
    return checkpoint


def _read(path: Path, meter: Meter, stack: ExitStack) -> tuple[Checkpoint, list[main_copies.Flat]]:
    """The checkpoint at `path`, or the latest one in the folder `path`; and where main copies may lie."""
    files = [path]
    if path.is_dir():
        found = _read_folder(path, meter, stack)
        if found is None:
            path = _latest(path, meter)
            found = _read_folder(path, meter, stack)
        if found is None:
            raise _nothing_in(path)
        files = [file for file in [*path.glob("*"), *path.glob("*/*")] if file.is_file()]
    elif not path.is_file():
        raise unreadable(path, "a checkpoint", "no such file or folder")
    elif path.suffix == ".safetensors":
        found = read_safetensors(path.parent, files, meter), []
    else:
        found = read_legacy(files, meter, stack)
    found[0].path, found[0].bytes_on_disk = path, sum(file.stat().st_size for file in files)
    return found


def _read_folder(path: Path, meter: Meter, stack: ExitStack) -> tuple[Checkpoint, list[main_copies.Flat]] | None:
    """The checkpoint whose files lie in `path` itself, or None."""
    if (path / ".metadata").exists():
        return read_dcp(path, meter, stack)
    if (path / "model.safetensors.index.json").exists():
        return read_safetensors(path, [], meter), []
    if shards := sorted(path.glob("*.safetensors")):
        return read_safetensors(path, shards, meter), []
    if ranks := sorted(path.glob("mp_rank_*/model_optim_rng.pt")):
        return read_legacy(ranks, meter, stack)
    return None


def _latest(path: Path, meter: Meter) -> Path:
    """The folder of the latest checkpoint below `path`, or `path` itself where none is."""
    tracker = path / "latest_checkpointed_iteration.txt"
    if tracker.exists():
        said = read_small(tracker, meter, 64).decode("ascii", "replace").strip()
        chosen = path / ("release" if said == "release" else f"iter_{int(said):07d}" if said.isdecimal() else "")
        if chosen == path or not chosen.is_dir():
            raise unreadable(tracker, "an iteration that has a folder here", repr(said))
        return chosen
    folders = [child for child in path.iterdir() if _ITERATION.match(child.name) and child.is_dir()]
    return max(folders, key=lambda child: int(child.name[5:]), default=path)


def _nothing_in(path: Path) -> CheckpointUnreadableError:
    """The error for a folder without a checkpoint that can be read: it says what there is."""
    if next(path.glob("*/.zarray"), None):
        return CheckpointUnreadableError(
            f"{path}: a zarr checkpoint (Megatron up to 0.12); it cannot be read here: convert it to torch_dist with "
            "the Megatron that wrote it"
        )
    return unreadable(
        path,
        "DCP's .metadata, *.safetensors, mp_rank_*/model_optim_rng.pt, or iter_… folders with one of them",
        ", ".join(sorted(child.name for child in path.iterdir())[:8]) or "an empty folder",
    )
