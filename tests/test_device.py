"""`doctor --device`: what it measures without a GPU, and what it makes of what a GPU gives. tests/gpu runs the rest."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from bootstrap import NEWEST, ensure_release

from megatron_fp32_router.cli import main
from megatron_fp32_router.compat import device, doctor
from megatron_fp32_router.gating import matmul

#: What an idle GPU of today might give.
FAST = {
    "bf16": {"forward_ms": 0.03, "backward_ms": 0.07},
    "TF32": {"forward_ms": 0.15, "backward_ms": 0.3},
    "fp32": {"forward_ms": 0.4, "backward_ms": 0.8},
    "split": {"forward_ms": 0.1, "backward_ms": 0.3},
}


def measured(times: dict[str, Any] = FAST, splitting_ms: float = 0.02) -> dict[str, Any]:
    row = device.measure((64, 128, 16), torch.device("cpu"))
    for name, taken in times.items():
        row["ways"][name] |= taken
    return {**row, "auto": "split bf16 products", "splitting_ms": splitting_ms}


def said(row: dict[str, Any], asked: str = "auto") -> list[tuple[str, str]]:
    return [(level, text.partition(": ")[2]) for level, text in device.sentences_about(row, asked)]


def test_errors_are_those_of_each_arithmetic() -> None:
    ways = device.measure((512, 512, 32), torch.device("cpu"))["ways"]
    for product in ("logits", "gradient of the weight"):
        mean = {name: way["errors"][product]["mean"] for name, way in ways.items()}
        assert mean["split"] <= device.TOLERANCE * mean["fp32"] < device.TF32_SHOWS
        assert 10 * device.TF32_SHOWS < mean["TF32"] < mean["bf16"] / 5
    assert ways["bf16"]["other_experts"] > ways["TF32"]["other_experts"] >= ways["fp32"]["other_experts"] == 0


def test_faster_split_products_are_no_reason_to_do_anything() -> None:
    (_, exact), (level, faster) = said(measured())
    assert exact == "split products are as exact as fp32; auto takes split bf16 products"
    assert level == "ok"
    assert faster == (
        "split products are faster: 0.4 ms a micro-batch (and 0.02 ms a step to split the weight), plain fp32 1.2 ms"
    )


def test_slower_split_products_are_said_with_the_way_out_and_are_no_problem() -> None:
    # Splitting the weight counts too: with one micro-batch a step it decides here.
    for times, splitting in (({"split": {"forward_ms": 0.5, "backward_ms": 0.9}}, 0.0), ({}, 0.9)):
        row = measured({**FAST, **times}, splitting)
        ((_, _), (level, slower)) = said(row)
        assert level == "note"
        assert slower.startswith("split products are SLOWER: ")
        assert slower.endswith("MEGATRON_FP32_ROUTER_PRODUCTS=fp32 is as exact, and faster here")
        assert said(row, "fp32")[1][1].endswith("MEGATRON_FP32_ROUTER_PRODUCTS=fp32 is set: keep it")
    assert said(measured(), "fp32")[1] == (
        "note",
        "split products are faster: 0.4 ms a micro-batch (and 0.02 ms a step to split the weight), plain fp32 1.2 ms. "
        "MEGATRON_FP32_ROUTER_PRODUCTS=fp32 is set: unset it",
    )


def test_products_that_are_not_exact_are_a_problem() -> None:
    row = measured()
    row["ways"]["split"]["errors"]["logits"]["mean"] = 1e-7
    (level, text), _ = said(row)
    assert level == "problem"
    assert text.startswith("errors of split products are above fp32's (logits ")
    assert "set MEGATRON_FP32_ROUTER_PRODUCTS=fp32" in text
    assert said(row, "fp32")[0][0] == "note"  # they are not used
    row["ways"]["split"]["errors"]["logits"]["mean"] = float("nan")
    assert said(row)[0][0] == "problem"


def test_tf32_in_a_plain_product_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    real = matmul.mm
    monkeypatch.setattr(device, "mm", lambda a, b: real(device.tf32(a), device.tf32(b)))
    (level, text), _ = said(measured())
    assert level == "problem"
    assert text == ("plain products are not fp32 (logits, gradient of the weight): something turns TF32 on")


def test_a_device_that_cannot_split_is_told_and_only_split_is_then_a_problem() -> None:
    row = {**measured(), "auto": "plain products: torch 2.6.0 has no mm(out_dtype=...); 2.8 has"}
    del row["ways"]["split"]
    told = "products cannot be split: plain products: torch 2.6.0 has no mm(out_dtype=...); 2.8 has"
    assert [said(row, asked) for asked in ("auto", "fp32", "split")] == [
        [("note", told)],
        [("note", told)],
        [("problem", told)],
    ]


def test_without_a_gpu_it_says_so_emulates_and_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["doctor", "--megatron", str(ensure_release(NEWEST)), "--device", "--shape", "64x128x8"]
    before = torch.get_float32_matmul_precision()
    assert main([*arguments, "--json"]) == 2
    assert torch.get_float32_matmul_precision() == before
    found = json.loads(capsys.readouterr().out)
    assert found["device"]["gpu"] is found["device"]["graph"] is None
    (row,) = found["device"]["shapes"]
    assert row["ways"].keys() == FAST.keys()
    assert row["ways"]["split"]["forward_ms"] is None
    assert [f["level"] for f in found["findings"] if f["about"] == "device"] == ["unknown"]
    assert main(arguments) == 2
    shown = capsys.readouterr().out
    assert "there is no GPU here: products are emulated, their times and graphs not measured" in shown
    assert "Not everything could be looked at" in shown


@pytest.mark.parametrize("shape", ["4096", "4096x7168", "0x64x8", "axbxc", "4096x7168x256x8"])
def test_a_shape_that_is_none_is_one_line_and_exit_code_2(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--device", "--shape", shape])
    assert ended.value.code == 2
    assert "expected TOKENSxHIDDENxEXPERTS" in capsys.readouterr().err


def test_a_failed_measurement_on_a_device_is_a_finding_and_no_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 200.00 GiB.\nmore")

    monkeypatch.setattr(device, "measure", too_large)
    found = doctor.Diagnosis()
    doctor._look_at_device(found, [])
    assert found.code == 2
    assert found.findings[-1].text == "could not be measured: CUDA out of memory. Tried to allocate 200.00 GiB."


def test_without_torch_the_rest_is_said_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron_fp32_router.compat.device", None)
    monkeypatch.delattr("megatron_fp32_router.compat.device")
    found = doctor.Diagnosis()
    doctor._look_at_device(found, [])
    assert found.code == 2
    assert found.findings[0].text.startswith("torch is needed to measure it")
