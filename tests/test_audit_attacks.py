"""The audit's command on files that were made to do harm, and on places where it cannot write.

Every one ends with exit code 2 and one line that names the file: 1 would say that a problem was found in the routers.
"""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_fp32_router.audit import dcp as reader
from megatron_fp32_router.audit import files, findings, open_checkpoint
from megatron_fp32_router.cli import main
from megatron_fp32_router.errors import CheckpointUnreadableError

CORPUS = Path(__file__).parent / "corpus" / "audit"
OFF, ON = CORPUS / "0.11.0-off-torch_dist", CORPUS / "0.19.2-on-torch_dist"
NAME = "decoder.layers.0.mlp.router.weight"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that the command says; whatever it prints before is of other files."""
    capsys.readouterr()
    start = time.monotonic()
    assert main(["audit", *map(str, arguments)]) == 2
    assert time.monotonic() - start < 20
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megatron-fp32-router audit: ")
    assert len(line) < 1000
    return line


# DCP's metadata -----------------------------------------------------------------------------------------------------


def laughs(depth: int) -> Any:
    """A list whose repr has 2^depth elements."""
    value: Any = ["x"]
    for _ in range(depth):
        value = [value, value]
    return value


def deep(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def _size(size: Any) -> Callable[[Any], None]:
    def change(metadata: Any) -> None:
        for entry in metadata.state_dict_metadata.values():
            entry.size = size

    return change


def _offset(offset: Any) -> Callable[[Any], None]:
    def change(metadata: Any) -> None:
        for index, info in list(metadata.storage_data.items()):
            del metadata.storage_data[index]
            metadata.storage_data[Index(index.fqn, offset)] = info

    return change


def _length(length: Any) -> Callable[[Any], None]:
    def change(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.length = length

    return change


class Index:
    """A key like DCP's MetadataIndex, whose hash does not look at what it holds."""

    def __init__(self, fqn: str, offset: Any) -> None:
        self.fqn, self.offset = fqn, offset


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_offset(([],)), id="an offset that has no hash"),
        pytest.param(_offset((1 << 70,)), id="an offset beyond any file"),
        pytest.param(_size((1 << 40_000, 2)), id="an integer that Python will not print"),
        pytest.param(_size(laughs(26)), id="a billion laughs"),
        pytest.param(_size((laughs(26), 2)), id="a billion laughs in a tuple"),
        pytest.param(_size(deep(400)), id="a deep list"),
        pytest.param(_size((2,) * 100_000), id="a hundred thousand axes"),
        pytest.param(_size((0, 1 << 61)), id="no elements of an enormous shape"),
        pytest.param(_size((-1, 2)), id="a negative size"),
        pytest.param(_length(1 << 70), id="a piece beyond any file"),
        pytest.param(_length(-1), id="a piece of negative length"),
        pytest.param(_length(laughs(26)), id="a length that is a list"),
    ],
)
def test_metadata_made_to_do_harm_is_refused_by_name(
    change: Callable[[Any], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dcp.save({NAME: torch.ones(2, 2)}, checkpoint_id=tmp_path, no_dist=True)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    change(metadata)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    said = refused(capsys, tmp_path)
    assert str(tmp_path / ".metadata") in said or ".distcp" in said


def test_a_shape_that_its_files_cannot_hold_takes_no_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dcp.save({NAME: torch.ones(2, 2)}, checkpoint_id=tmp_path, no_dist=True)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    for entry in metadata.state_dict_metadata.values():
        entry.size = torch.Size([1 << 14, 1 << 13])
        entry.chunks[0].sizes = entry.size
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    tracemalloc.start()
    said = refused(capsys, tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert "expected 134217728 elements" in said


# torch's archives ---------------------------------------------------------------------------------------------------


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def _int(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _tuple(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def _tensor(shape: tuple[int, ...], stride: tuple[int, ...], numel: int = 1) -> bytes:
    storage = _tuple(_text("storage"), b"ctorch\nFloatStorage\n", _text("0"), _text("cpu"), _int(numel)) + b"Q"
    sizes = _tuple(*map(_int, shape)), _tuple(*map(_int, stride))
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + _tuple(storage, _int(0), *sizes, b"\x89", b"N") + b"R"


def archive(path: Path, tensors: dict[str, bytes], data: bytes = bytes(4)) -> Path:
    """A file as torch.save writes it, of whatever torch.save would not write."""
    items = b"".join(_text(name) + tensor + b"s" for name, tensor in tensors.items())
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("m/data.pkl", b"\x80\x02}" + _text("model") + b"}" + items + b"s.")
        file.writestr("m/data/0", data)
    return path


@pytest.mark.parametrize(
    ("shape", "stride", "says"),
    [
        ((1 << 10, 1 << 17), (0, 0), "1 that are repeated"),
        ((1 << 10, 64), (0, 1), "64 that are repeated"),
        ((0, 1 << 61), (1, 1), "router's tensor of at most"),
        ((0, 1 << 61, 1 << 61), (1, 1, 1), "router's tensor of at most"),
        ((1 << 20, 1 << 20), (1 << 20, 1), "router's tensor of at most"),
        ((1 << 10, 1 << 10), (1 << 10, 1), "a tensor inside its 1 elements"),
    ],
)
def test_a_view_that_is_larger_than_what_it_lies_in_is_refused_before_memory_is_taken(
    shape: Any, stride: Any, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = archive(tmp_path / "model.pt", {NAME: _tensor(shape, stride)}, bytes(256))
    tracemalloc.start()
    said = refused(capsys, file)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert str(file) in said
    assert says in said


def test_all_router_tensors_together_are_bounded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"decoder.layers.{layer}.mlp.router.weight" for layer in range(9)]
    file = archive(tmp_path / "model.pt", {n: _tensor((4, 4), (4, 1), 16) for n in names}, bytes(64))
    monkeypatch.setattr(files, "MAX_TOTAL", 8 * 64)
    assert f"{file}: expected at most 512 bytes of router tensors in a checkpoint" in refused(capsys, file)
    monkeypatch.setattr(files, "MAX_TOTAL", 9 * 64)
    assert len(open_checkpoint(file).tensors) == 9
    monkeypatch.setattr(files, "MAX_TENSORS", 8)
    assert "at most 8 router tensors" in refused(capsys, file)


def test_the_pieces_of_a_tensor_count_as_one_and_not_again_and_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dcp.save({NAME: torch.ones(4, 4), NAME + ".piece": torch.ones(2, 4)}, checkpoint_id=tmp_path, no_dist=True)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    whole, piece = (metadata.state_dict_metadata[n] for n in (NAME, NAME + ".piece"))
    (chunk,) = piece.chunks
    # Two halves, as two ranks write them: the same bytes for both.
    where = {index.fqn: info for index, info in metadata.storage_data.items()}[NAME + ".piece"]
    metadata.storage_data = {Index(NAME, (row, 0)): where for row in (0, 2)}
    whole.chunks = [type(chunk)(torch.Size([row, 0]), torch.Size([2, 4])) for row in (0, 2)]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    monkeypatch.setattr(files, "MAX_TOTAL", 64)
    monkeypatch.setattr(files, "MAX_TENSORS", 1)
    (found,) = open_checkpoint(tmp_path).tensors
    assert found.shape == (4, 4)
    monkeypatch.setattr(files, "MAX_TOTAL", 63)
    assert "at most 63 bytes of router tensors" in refused(capsys, tmp_path)
    monkeypatch.undo()
    # As often as there are ranks: no harm. Overlapping in other ways: no planner does that, and it has no end.
    whole.chunks *= 1000
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    read = open_checkpoint(tmp_path).bytes_read
    assert read < 100_000 + (tmp_path / ".metadata").stat().st_size
    whole.chunks += [type(chunk)(torch.Size([row, 0]), torch.Size([1, 4])) for row in range(4)] * 2
    whole.chunks += [type(chunk)(torch.Size([0, 0]), torch.Size([4, 4]))]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "expected each element of" in refused(capsys, tmp_path)


PRIME = (1 << 61) - 1


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(b"".join(_int(PRIME * k) + b"N" for k in range(1, 50_000)), id="integers"),
        pytest.param(b"".join(_tuple(_int(PRIME * k)) + b"N" for k in range(1, 50_000)), id="tuples of integers"),
        pytest.param(_tuple(b"N" * 100_000) + b"q\0N" + b"h\0N" * 100_000, id="one long tuple again and again"),
    ],
)
def test_keys_that_all_have_one_hash_cost_no_time(
    keys: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as file:
        file.writestr("m/data.pkl", b"\x80\x02}(" + keys + b"u.")
    assert f"{tmp_path / 'model.pt'}: data.pkl is truncated or garbled" in refused(capsys, tmp_path / "model.pt")


def test_a_memo_whose_indices_all_have_one_hash_costs_no_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as file:
        file.writestr("m/data.pkl", b"\x80\x02N" + b"".join(b"p%d\n" % (PRIME * k) for k in range(1, 50_000)) + b".")
    assert "a memo index that no checkpoint has" in refused(capsys, tmp_path / "model.pt")


def test_half_a_character_in_a_name_upsets_no_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    file = archive(tmp_path / "model.pt", {"\ud800.layers.0.mlp.router.weight": _tensor((2, 2), (2, 1), 4)}, bytes(16))
    page, out = tmp_path / "page.html", tmp_path / "out"
    # All zeros: cannot tell.
    assert main(["audit", str(file), "--html", str(page), "--repair", str(out)]) == 2
    assert "?.layers.0.mlp.router.weight" in capsys.readouterr().out
    assert "\\ud800.layers.0" in page.read_text()
    assert "\\ud800.layers.0" in (out / "repair.json").read_text()
    assert main(["audit", str(file), "--json"]) == 2


# Whatever else goes wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [MemoryError(), OverflowError("x"), RecursionError("x"), TypeError("x"), KeyError(7)])
def test_no_failure_on_a_files_content_is_taken_for_a_verdict(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(reader.DcpReader, "describe", fail)
        assert str(ON) in (said := refused(capsys, ON))
        assert type(error).__name__ in said
        with pytest.raises(CheckpointUnreadableError):
            open_checkpoint(ON)
    monkeypatch.setattr(findings, "_finite", fail)
    assert f"{ON}: its values cannot be judged: {type(error).__name__}" in refused(capsys, ON)


def test_a_machine_without_enough_memory_is_told_the_file(tmp_path: Path) -> None:
    torch.save({"model": {NAME: torch.zeros(1 << 13, 1 << 15, dtype=torch.bool)}}, tmp_path / "model.pt")
    command = [sys.executable, "-m", "megatron_fp32_router", "audit", str(tmp_path / "model.pt")]
    limit = 600 << 20
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"{tmp_path / 'model.pt'}: " in done.stderr
    assert "MemoryError" in done.stderr


# Where it cannot write ----------------------------------------------------------------------------------------------


def test_places_that_cannot_be_written_are_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    for option, target in (
        ("--html", "/proc/x/y.html"),
        ("--html", tmp_path),
        ("--html", tmp_path / "file" / "y.html"),
        ("--html", "/proc/self/y.html"),
        ("--repair", "/proc/x/out"),
        ("--repair", tmp_path / "file" / "out"),
        ("--repair", tmp_path),
    ):
        assert str(target).removesuffix("/out").removesuffix("/y.html") in refused(capsys, OFF, option, target)
    assert (tmp_path / "file").read_text() == "x"


def test_nothing_is_written_into_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "iter_0000010"
    folder.mkdir()
    for file in OFF.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for path in (folder, tmp_path):
        assert "which stays as it is; nothing was written" in refused(capsys, path, "--repair", folder / "fixed")
    assert "it was not written over" in refused(capsys, folder, "--html", folder / ".metadata")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    # Beside the folders of a run is not inside a checkpoint.
    assert main(["audit", str(tmp_path), "--repair", str(tmp_path / "fixed")]) == 1


@pytest.mark.parametrize(("limit", "code"), [("inf", 1), ("0", 1), ("nan", 2), ("-1", 2), ("x", 2)])
def test_the_search_limit_is_a_number_or_everything(limit: str, code: int) -> None:
    try:
        found = main(["audit", str(OFF), "--search-limit", limit])
    except SystemExit as stop:
        found = int(str(stop.code))
    assert found == code


def test_a_reader_that_leaves_and_a_log_in_ascii_are_no_error() -> None:
    command = [sys.executable, "-m", "megatron_fp32_router", "audit", str(OFF)]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    assert (done.returncode, done.stderr) == (2, "")
    plain = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=plain)
    assert (done.returncode, done.stderr) == (1, "")
    assert io.StringIO(done.stdout).readline().isascii()
