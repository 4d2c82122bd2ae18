"""`megatron-fp32-router audit`: exit codes, output, repair, and how little of a large checkpoint it reads."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.numpy import load_file, save_file

from megatron_fp32_router.audit import open_checkpoint, printing
from megatron_fp32_router.audit.finding import Audit, Finding
from megatron_fp32_router.cli import main

CORPUS = Path(__file__).parent / "corpus" / "audit"
OFF, ON = str(CORPUS / "0.11.0-off-torch_dist"), str(CORPUS / "0.19.2-on-torch_dist")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([ON], 0),
        ([OFF], 1),
        ([ON, OFF], 1),
        ([ON, "/nowhere"], 2),
        ([OFF, "/nowhere"], 1),
        (["/nowhere"], 2),
        ([ON, "--against", "/nowhere"], 2),
        ([ON, OFF, "--repair", "/nowhere"], 2),
        ([str(CORPUS / "huggingface"), "--protect", "buffers"], 2),
    ],
)
def test_exit_codes(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", *arguments]) == code
    if "/nowhere" in arguments and code == 2 and "--repair" not in arguments:
        assert "/nowhere: expected a checkpoint, found no such file or folder" in capsys.readouterr().err


def test_json_holds_every_tensor_and_every_answer(capsys: pytest.CaptureFixture[str]) -> None:
    main(["audit", OFF, "--json"])
    said = json.loads(capsys.readouterr().out)
    assert (said["verdict"], said["checkpoint"]["iteration"]) == ("problem", 10)
    weight, bias = sorted(said["tensors"], key=lambda tensor: tensor["kind"], reverse=True)
    assert (weight["dtype"], weight["layer"], weight["shape"]) == ("bfloat16", 0, [6, 8])
    assert weight["main_copy"] == "optimizer.state.fp32_param.decoder.layers.mlp.router.weight"
    assert {finding["check"]: finding["verdict"] for finding in bias["findings"]} == {
        "dtype": "problem",
        "updates": "problem",
    }


@pytest.mark.parametrize("rich", [True, False])
def test_the_table_names_tensors_and_reasons_with_and_without_rich(
    rich: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    main(["audit", OFF])
    said = " ".join(capsys.readouterr().out.split())
    assert "decoder.layers.0.mlp.router.expert_bias" in said
    assert "6 of 6 biases cannot take an update of 0.001 in bfloat16" in said
    assert "verdict: PROBLEM" in said


def test_layers_with_the_same_answer_share_a_row(tmp_path: Path) -> None:
    weights = {f"model.layers.{i}.mlp.gate.weight": np.ones((2, 4), np.float16) for i in (3, 4, 5, 9)}
    save_file(weights, tmp_path / "model.safetensors")
    from megatron_fp32_router.audit import audit

    (row,) = printing.rows(audit(open_checkpoint(tmp_path)))
    assert row[0] == "model.layers.{3-5,9}.mlp.gate.weight"


def test_only_answers_about_layers_share_a_row_when_they_differ_in_figures() -> None:
    texts = ["12 of 34 files were read", "5 of 34 files were read"]
    of_layers = [Finding(f"layers.{layer}.router.weight", "room", "good", text) for layer, text in enumerate(texts)]
    of_all = [Finding("", "serving", "note", text) for text in texts]
    table = printing.rows(Audit(open_checkpoint(Path(ON)), of_layers + of_all), brief=True)
    assert [(name, text) for name, _, _, text in table] == [
        ("layers.{0-1}.router.weight", f"layer 0: {texts[0]}"),
        ("checkpoint", texts[0]),
        ("checkpoint", texts[1]),
    ]


def test_names_from_a_file_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.\x1b[2J[red]layers.3.mlp.gate.weight"
    save_file({name: np.ones((2, 4), np.float32)}, tmp_path / "model.safetensors")
    main(["audit", str(tmp_path)])
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "[red]" in said


def test_the_page_escapes_what_a_file_names_and_shows_equal_biases(tmp_path: Path) -> None:
    values = {"<script>x</script>.layers.0.mlp.gate.weight": np.ones((2, 4), np.float16)}
    values["model.layers.1.mlp.gate.e_score_correction_bias"] = np.array([0.5, 0.5, 0.25, 0.5], np.float32)
    values["</script>.layers.2.mlp.gate.e_score_correction_bias"] = np.full(4, 0.125, np.float32)
    save_file(values, tmp_path / "model.safetensors")
    main(["audit", str(tmp_path), "--rate", "1e-3", "--html", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text()
    assert "&lt;script&gt;" in text
    # Two charts, each with its data, and the page's own script.
    assert (text.count("<script"), text.count("</script>")) == (3, 3)
    assert "4 biases from 0.25 to 0.5; 3 are 0.5." in text
    assert "4 biases from 0.125 to 0.125; 4 are 0.125." in text
    assert '"values":[null,0.5,0.5,0.5]' in text
    assert "--rate 0.001" in text


def test_repair_writes_exact_values_beside_and_says_what_it_could_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["audit", OFF, "--repair", str(out)]) == 1
    said = capsys.readouterr().out
    assert "repair: 1 tensors restored exactly" in said
    assert "not restored: decoder.layers.0.mlp.router.expert_bias: no main copy" in " ".join(said.split())
    (name,) = load_file(out / "router.safetensors")
    assert name == "decoder.layers.0.mlp.router.weight"
    # Nothing is ever written over.
    assert main(["audit", OFF, "--repair", str(out)]) == 2
    assert "nothing was written" in capsys.readouterr().err


def test_what_was_restored_is_clean(tmp_path: Path) -> None:
    main(["audit", OFF, "--repair", str(tmp_path / "out")])
    assert main(["audit", str(tmp_path / "out" / "router.safetensors")]) == 0


def test_neither_torch_nor_megatron_is_imported_and_a_missing_extra_is_named(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules.update({name: None for name in ARGV});"
        "from megatron_fp32_router.cli import main; code = main(['audit', PATH]);"
        "bad = [name for name in ('torch', 'megatron') if sys.modules.get(name)]; sys.exit(100 if bad else code)"
    )
    for blocked, code in (("torch,megatron", 0), ("numpy", 2), ("safetensors", 2), ("ml_dtypes", 2)):
        text = program.replace("ARGV", repr(blocked.split(","))).replace("PATH", repr(ON))
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
        hint = (
            f"megatron-fp32-router audit: {blocked} is not installed: {sys.executable} -m pip install numpy ml_dtypes"
        )
        assert code == 0 or done.stderr.startswith(hint)


# Large checkpoints -----------------------------------------------------------------------------------------------


def bytes_read_by_this_process() -> int:
    """What the kernel counted; mapped files are not in it."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["rchar"])


def test_of_a_500_gb_dcp_checkpoint_only_router_tensors_are_read(tmp_path: Path) -> None:
    truth = {f"decoder.layers.{i}.mlp.router.weight": torch.randn(64, 256).bfloat16() for i in range(4)}
    dcp.save({**truth, "decoder.embedding": torch.zeros(4)}, checkpoint_id=tmp_path, no_dist=True)
    hole = 500 * 10**9
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    (file,) = tmp_path.glob("*.distcp")
    small = file.read_bytes()
    # The same items behind 500 GB of other tensors, which a sparse file has for nothing.
    with file.open("wb") as sparse:
        sparse.seek(hole)
        sparse.write(small)
    for info in metadata.storage_data.values():
        info.offset += hole
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    open_checkpoint(CORPUS / "0.11.0-off-torch_dist")  # whatever a first call imports
    before = bytes_read_by_this_process()
    found = open_checkpoint(tmp_path)
    assert bytes_read_by_this_process() - before < 300_000
    routers = sum(tensor.nbytes for tensor in truth.values())
    assert routers < found.bytes_read < routers + 50_000
    assert found.bytes_on_disk > hole
    for tensor in found.tensors:
        assert tensor.values is not None
        assert np.array_equal(tensor.values.view(np.int16), truth[tensor.name].view(torch.int16).numpy())


def test_of_a_500_gb_safetensors_file_only_the_header_and_router_tensors_are_read(tmp_path: Path) -> None:
    gate = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    hole = 500 * 10**9
    header = {
        "model.embed_tokens.weight": {"dtype": "U8", "shape": [hole], "data_offsets": [0, hole]},
        "model.layers.0.mlp.gate.weight": {
            "dtype": "F32",
            "shape": [64, 256],
            "data_offsets": [hole, hole + gate.nbytes],
        },
    }
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as sparse:
        sparse.write(len(text).to_bytes(8, "little") + text)
        sparse.seek(hole, io.SEEK_CUR)
        sparse.write(gate.tobytes())
    found = open_checkpoint(tmp_path)
    assert found.bytes_read == 8 + len(text) + gate.nbytes
    assert np.array_equal(found.tensors[0].values, gate)  # type: ignore[arg-type]


def test_of_a_legacy_checkpoint_only_the_index_and_router_tensors_are_read(tmp_path: Path) -> None:
    model = {"decoder.layers.0.mlp.router.weight": torch.randn(8, 16), "embedding": torch.zeros(1 << 24)}
    torch.save({"model": model}, tmp_path / "model.pt")
    open_checkpoint(tmp_path / "model.pt")
    before = bytes_read_by_this_process()
    found = open_checkpoint(tmp_path / "model.pt")
    assert found.bytes_read < 10_000
    assert bytes_read_by_this_process() - before < 20_000
    assert found.bytes_on_disk > 64_000_000


def test_a_truncated_large_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(ON, tmp_path / "copy")
    file = next((tmp_path / "copy").glob("*.distcp"))
    with file.open("r+b") as stream:
        stream.truncate(1000)
    assert main(["audit", str(tmp_path / "copy")]) == 2
    assert f"{file}: expected " in (said := capsys.readouterr().err)
    assert "truncated" in said


def test_progress_is_shown_after_two_seconds_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(printing.time, "monotonic", lambda: clock[0])

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for out, expected in ((io.StringIO(), 1), (Terminal(), 2)):
        clock[0] = 0.0
        tell: Any = printing.progress(out)
        for clock[0] in (0.5, 1.9):
            tell(10**6, "a.distcp")
        assert out.getvalue() == ""
        for clock[0] in (11.0, 11.1, 12.0):
            tell(2 * 10**9, "a.distcp")
        assert out.getvalue().count("reading router tensors: 2.0 GB, now a.distcp") == expected
