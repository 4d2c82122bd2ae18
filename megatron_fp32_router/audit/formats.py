"""Which format is this, and the one door to all readers."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

from megatron_fp32_router.audit import main_copies
from megatron_fp32_router.audit.dcp import read_dcp
from megatron_fp32_router.audit.files import Meter, read_small, unreadable
from megatron_fp32_router.audit.huggingface import read_safetensors
from megatron_fp32_router.audit.legacy import read_legacy
from megatron_fp32_router.audit.tensors import Checkpoint, unstack
from megatron_fp32_router.errors import CheckpointUnreadableError

if TYPE_CHECKING:
    from collections.abc import Callable

#: Bytes of unnamed optimizer buffers that are searched for main copies, unless told otherwise.
SEARCH_LIMIT: Final = 2 << 30

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
        # What a file of unknown origin can bring about is not to be listed; MemoryError, OverflowError, RecursionError
        # and UnicodeError have all been seen. None may look like the exit code of a problem that was found.
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
    if path.is_file():
        if path.suffix == ".safetensors":
            found: tuple[Checkpoint, list[main_copies.Flat]] = read_safetensors(path.parent, [path], meter), []
        else:
            found = read_legacy([path], meter, stack)
        found[0].path, found[0].bytes_on_disk = path, path.stat().st_size
        return found
    if not path.is_dir():
        raise unreadable(path, "a checkpoint", "no such file or folder")
    if (path / ".metadata").exists():
        found = read_dcp(path, meter, stack)
    elif (path / "model.safetensors.index.json").exists():
        found = read_safetensors(path, [], meter), []
    elif shards := sorted(path.glob("*.safetensors")):
        found = read_safetensors(path, shards, meter), []
    elif ranks := sorted(path.glob("mp_rank_*/model_optim_rng.pt")):
        found = read_legacy(ranks, meter, stack)
        found[0].path = path
    else:
        return _read(_latest(path, meter), meter, stack)
    found[0].bytes_on_disk = sum(file.stat().st_size for file in [*path.glob("*"), *path.glob("*/*")] if file.is_file())
    return found


def _latest(path: Path, meter: Meter) -> Path:
    """The checkpoint to read among several in one folder."""
    tracker = path / "latest_checkpointed_iteration.txt"
    if tracker.exists():
        said = read_small(tracker, meter, 64).decode("ascii", "replace").strip()
        chosen = path / ("release" if said == "release" else f"iter_{int(said):07d}" if said.isdecimal() else "")
        if chosen == path or not chosen.is_dir():
            raise unreadable(tracker, "an iteration that has a folder here", repr(said))
        return _checkpoint_folder(chosen)
    folders = [child for child in path.iterdir() if _ITERATION.match(child.name) and child.is_dir()]
    if folders:
        return _checkpoint_folder(max(folders, key=lambda child: int(child.name[5:])))
    return _checkpoint_folder(path)


def _checkpoint_folder(path: Path) -> Path:
    """`path`, if some format that can be read lies in it.

    Raises:
        CheckpointUnreadableError: none does; the message says what there is.
    """
    known = ("/.metadata", "/*.safetensors", "/mp_rank_*/model_optim_rng.pt", "/model.safetensors.index.json")
    if any(next(path.glob(pattern[1:]), None) for pattern in known):
        return path
    if next(path.glob("*/.zarray"), None):
        raise CheckpointUnreadableError(
            f"{path}: a zarr checkpoint (Megatron up to 0.12); it cannot be read here: convert it to torch_dist with "
            "the Megatron that wrote it"
        )
    raise unreadable(
        path,
        "DCP's .metadata, *.safetensors, mp_rank_*/model_optim_rng.pt, or iter_… folders with one of them",
        ", ".join(sorted(child.name for child in path.iterdir())[:8]) or "an empty folder",
    )
