"""The audit on files that were damaged, or made to do harm: a clear error or a report, nothing else.

tests/corpus/audit holds small checkpoints: of Megatron 0.11.0 without the plugin and of 0.19.2 with it, ten steps from
a bias of 0.75, as torch_dist and legacy, and one of safetensors. They were written by the laboratory.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import pickletools
import shutil
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from megatron_fp32_router.audit import audit, open_checkpoint, pickles
from megatron_fp32_router.cli import main
from megatron_fp32_router.errors import CheckpointUnreadableError

CORPUS = Path(__file__).parent / "corpus" / "audit"
FILES = sorted(path.relative_to(CORPUS).as_posix() for path in CORPUS.rglob("*") if path.is_file())
HERE = Path("here")

#: Examples of each fuzz test; more, and other ones each time: AUDIT_FUZZ=20000.
FUZZ = int(os.environ.get("AUDIT_FUZZ", "150"))
GATE = "model.layers.0.mlp.gate.weight"


def test_the_corpus_is_read_and_judged_as_it_was_written() -> None:
    verdicts = {folder.name: audit(open_checkpoint(folder)).verdict for folder in CORPUS.iterdir()}
    assert verdicts == {
        "0.11.0-off-legacy": "problem",
        "0.11.0-off-torch_dist": "problem",
        "0.19.2-on-legacy": "good",
        "0.19.2-on-torch_dist": "good",
        "huggingface": "problem",
    }
    assert {open_checkpoint(CORPUS / name).iteration for name in verdicts if name[0] == "0"} == {10}


@settings(max_examples=FUZZ, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_garbled_files_give_a_report_or_a_clear_error(data: Any, tmp_path: Path) -> None:
    name = data.draw(st.sampled_from(FILES))
    folder = name.partition("/")[0]
    work = tmp_path / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(CORPUS / folder, work)
    victim = work / name.partition("/")[2]
    content = bytearray(victim.read_bytes())
    # The first and last kilobytes hold headers and directories; the middle is mostly other tensors.
    place = st.one_of(st.integers(0, 1500), st.integers(-3000, -1), st.integers(0, len(content) - 1))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(place) % len(content)
        action = data.draw(st.sampled_from(["set", "set", "set", "cut", "drop", "double"]))
        if action == "set":
            content[at] = data.draw(st.integers(0, 255))
        elif action == "cut" and at:
            del content[at:]
        elif action == "drop":
            del content[at : at + data.draw(st.integers(1, 64))]
        else:
            content[at:at] = content[at : at + data.draw(st.integers(1, 64))]
        content = content or bytearray(b"\0")
    victim.write_bytes(content)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["audit", str(work), "--json"])
    found = json.loads(out.getvalue())
    assert code == {"good": 0, "problem": 1, "unknown": 2}[found["verdict"]]
    if "error" in found:
        (line,) = err.getvalue().splitlines()
        # Which file, and not by the last resort, which does not know what was expected.
        assert str(work) in line
        assert "cannot be read: " not in line or "Errno" in line
    else:
        assert found["checkpoint"]["path"] == str(work)
        assert err.getvalue() == ""


@settings(max_examples=FUZZ, deadline=None)
@given(data=st.binary(max_size=200))
def test_bytes_that_are_no_pickle_give_a_clear_error(data: bytes) -> None:
    for start in (b"", b"\x80\x02", b"\x80\x04\x95"):
        try:
            pickles.load(start + data, HERE, "a pickle")
        except CheckpointUnreadableError as error:
            said = str(error)
        else:
            # What is read whole is a pickle by the standard library's account as well.
            said = "here: " if list(pickletools.genops(start + data)) else ""
        assert said.startswith("here: ")


class Attack:
    """Pickles to a call of anything."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def test_nothing_in_a_pickle_is_imported_or_called(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    attack = [Attack(os.system, f"touch {canary}"), Attack(eval, f"open({str(canary)!r}, 'w')"), Attack(exec, "1/0")]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(attack))
    with pytest.raises(CheckpointUnreadableError, match="expected DCP's Metadata, found list"):
        open_checkpoint(tmp_path)
    folder = tmp_path / "legacy" / "mp_rank_00"
    folder.mkdir(parents=True)
    state = {"model": {"decoder.layers.0.mlp.router.weight": torch.ones(2, 2)}, "args": attack}
    torch.save(state, folder / "model_optim_rng.pt")
    assert len(open_checkpoint(folder.parent).tensors) == 1
    assert not canary.exists()


def test_stand_ins_cannot_be_changed_by_what_they_read() -> None:
    before = dict(vars(pickles)), dict(pickles._ALLOWED)
    for target in (b"ctorch\nfloat32\n", b"ctorch\nSize\n", b"ccollections\nOrderedDict\n", b"cos\nsystem\n"):
        for state in (b"}X\x04\x00\x00\x00nameX\x01\x00\x00\x00xs", b"N}X\x06\x00\x00\x00__eq__K\x01s\x86"):
            with pytest.raises(CheckpointUnreadableError, match="state for a"):
                pickles.load(b"\x80\x02" + target + state + b"b.", HERE, "a pickle")
    assert (dict(vars(pickles)), dict(pickles._ALLOWED)) == before
    assert pickles._ALLOWED["torch", "float32"].name == "float32"


def nested(depth: int) -> bytes:
    """((x, x), (x, x)) … as a dictionary's key: its hash takes 2^depth steps."""
    return b"\x80\x02}K\x01K\x01\x86" + b"2\x86" * depth + b"K\x01s."


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a memo index that the C unpickler would allocate for", b"\x80\x02]r\xff\xff\xff\x7f."),
        ("a byte array of 100 GB", b"\x80\x05\x96" + (100 << 30).to_bytes(8, "little") + b"."),
        ("bytes of 100 GB", b"\x80\x04\x8e" + (100 << 30).to_bytes(8, "little") + b"."),
        ("text of 100 GB", b"\x80\x04\x8d" + (100 << 30).to_bytes(8, "little") + b"."),
        ("a frame of 100 GB", b"\x80\x04\x95" + (100 << 30).to_bytes(8, "little") + b"."),
        ("an integer with a billion digits", b"\x80\x02\x8b\xff\xff\xff\x3f."),
        ("a key whose hash never ends", nested(60)),
        ("keys of a set whose hash never ends", b"\x80\x04\x8f(K\x01K\x01\x86" + b"2\x86" * 60 + b"\x90."),
        ("a frozen set of the same", b"\x80\x04(K\x01K\x01\x86" + b"2\x86" * 60 + b"\x91."),
        ("an extension code", b"\x80\x02\x82\x01."),
        ("a list in a list, very deep", b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."),
        ("marks without an end", b"\x80\x02" + b"(" * 10**5),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pickle_bombs_cost_neither_time_nor_memory(name: str, data: bytes) -> None:
    tracemalloc.start()
    start = time.monotonic()
    with contextlib.suppress(CheckpointUnreadableError):
        pickles.load(data, HERE, name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300e6
    assert time.monotonic() - start < 20


def test_opcodes_that_no_checkpoint_needs_are_refused() -> None:
    for code in (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.EXT1, pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX):
        with pytest.raises(CheckpointUnreadableError, match="an opcode that is refused"):
            pickles.load(b"\x80\x05" + code + bytes(8) + b".", HERE, "a pickle")


def test_state_that_refers_to_itself_is_walked_once(tmp_path: Path) -> None:
    state: Any = {"model": {"decoder.layers.0.mlp.router.weight": torch.ones(2, 2)}}
    shared: list[Any] = []
    for _ in range(60):
        shared = [shared, shared]
    state["model"]["self"], state["optimizer"] = state["model"], shared
    torch.save(state, tmp_path / "model.pt")
    assert len(open_checkpoint(tmp_path / "model.pt").tensors) == 1


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../secret", "a/../../secret", "C:\\secret", "..\\secret", "\0", "", 7]
)
def test_no_name_in_a_checkpoint_leads_out_of_its_folder(tmp_path: Path, name: Any) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "secret").write_bytes(b"x" * 5000)
    (inner / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {GATE: name}}))
    with pytest.raises(CheckpointUnreadableError, match="name of a file"):
        open_checkpoint(inner)
    dcp_folder = tmp_path / "dcp"
    dcp.save({"decoder.layers.0.mlp.router.weight": torch.ones(2, 2)}, checkpoint_id=dcp_folder, no_dist=True)
    metadata = pickle.loads((dcp_folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = name
    (dcp_folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointUnreadableError, match="name of a file"):
        open_checkpoint(dcp_folder)


def test_sizes_that_a_file_only_claims_are_not_allocated(tmp_path: Path) -> None:
    header = {GATE: {"dtype": "F32", "shape": [1 << 40, 1 << 10], "data_offsets": [0, 1 << 52]}}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointUnreadableError, match="safetensors"):
        open_checkpoint(tmp_path)
    folder = tmp_path / "dcp"
    dcp.save({"decoder.layers.0.mlp.router.weight": torch.ones(2, 2)}, checkpoint_id=folder, no_dist=True)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for entry in metadata.state_dict_metadata.values():
        entry.size = torch.Size([1 << 30, 1 << 10])
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointUnreadableError, match="router's tensor of at most"):
        open_checkpoint(folder)


def test_a_view_that_repeats_its_storage_without_end_is_refused(tmp_path: Path) -> None:
    for view in (torch.ones(1).expand(1 << 20, 1 << 12), torch.ones(1, 1).expand(1 << 40, 1 << 20)):
        torch.save({"model": {"decoder.layers.0.mlp.router.weight": view}}, tmp_path / "model.pt")
        with pytest.raises(CheckpointUnreadableError, match="router's tensor of at most"):
            open_checkpoint(tmp_path / "model.pt")
    # As large as a router may be, and made of one value.
    torch.save({"model": {"decoder.layers.0.mlp.router.weight": torch.ones(1).expand(8, 16)}}, tmp_path / "model.pt")
    with pytest.raises(CheckpointUnreadableError, match=r"expected 128 elements .* found 1 that are repeated"):
        open_checkpoint(tmp_path / "model.pt")


def test_a_view_that_spans_more_than_a_router_is_refused_before_it_is_read(tmp_path: Path) -> None:
    pickled = (
        b"\x80\x02}X\x05\0\0\0model}X\x22\0\0\0decoder.layers.0.mlp.router.weightctorch._utils\n_rebuild_tensor_v2\n"
        b"((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu\x8a\x06\0\0\0\0\0\x01tQ"
        b"K\0K\x02K\x02\x86\x8a\x05\0\0\0\0\x01K\x01\x86\x89NtRss."
    )
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("model/data.pkl", pickled)
        archive.writestr("model/data/0", bytes(64))
    with pytest.raises(CheckpointUnreadableError, match="router's tensor within"):
        open_checkpoint(tmp_path / "model.pt")


def test_a_piece_that_is_missing_is_not_filled_with_anything(tmp_path: Path) -> None:
    dcp.save({"decoder.layers.0.mlp.router.weight": torch.ones(2, 2)}, checkpoint_id=tmp_path, no_dist=True)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    for entry in metadata.state_dict_metadata.values():
        entry.size = torch.Size([4, 2])
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointUnreadableError, match="found 4 of 8 elements"):
        open_checkpoint(tmp_path)


def test_pipes_folders_and_devices_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointUnreadableError, match="expected a regular file"):
        open_checkpoint(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / ".metadata").symlink_to("/dev/zero")
    (tmp_path / "b" / ".metadata").mkdir()
    for name in ("a", "b"):
        with pytest.raises(CheckpointUnreadableError, match="expected a regular file"):
            open_checkpoint(tmp_path / name)


def test_one_flipped_bit_in_a_routers_values_is_found_by_its_checksum(tmp_path: Path) -> None:
    value = torch.randn(8, 16)
    torch.save({"model": {"decoder.layers.0.mlp.router.weight": value}}, tmp_path / "model.pt")
    content = bytearray((tmp_path / "model.pt").read_bytes())
    content[content.index(value.numpy().tobytes()) + 100] ^= 1
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(CheckpointUnreadableError, match=r"the checksum [0-9a-f]{8} of data/0"):
        open_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "found an empty folder"),
        ({"readme.txt": b"?"}, "found readme.txt"),
        ({"weight/.zarray": b"{}"}, "a zarr checkpoint"),
        ({".metadata": b""}, "truncated or garbled"),
        ({"mp_rank_00/model_optim_rng.pt": b""}, "expected an archive as torch.save writes it"),
        ({"mp_rank_00/model_optim_rng.pt": b"\x80\x02}q\x00."}, "older; torch.load and torch.save make it new"),
        ({"latest_checkpointed_iteration.txt": b"10"}, "expected an iteration that has a folder here, found '10'"),
        ({"latest_checkpointed_iteration.txt": b"../../etc"}, "expected an iteration that has a folder"),
        ({"model.safetensors": b"\xff" * 30}, "not a whole safetensors file"),
        ({"model.safetensors.index.json": b"["}, "expected JSON"),
        ({"model.safetensors.index.json": b"[" * 10**5}, "expected JSON"),
        ({"model.safetensors.index.json": b"{}"}, "expected a weight_map"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, files: dict[str, bytes], says: str) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointUnreadableError) as error:
        open_checkpoint(tmp_path)
    assert says in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_checkpoint_without_routers_is_no_good_one(tmp_path: Path) -> None:
    import numpy as np

    save_file({"model.embed_tokens.weight": np.ones((2, 2), np.float32)}, tmp_path / "model.safetensors")
    found = audit(open_checkpoint(tmp_path))
    assert (found.verdict, found.exit_code) == ("unknown", 2)
