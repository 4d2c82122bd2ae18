"""Copy an export to Hugging Face's format, with the router tensors that the training's checkpoint has."""

from __future__ import annotations

import json
import re
import shutil
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np

from megatron_fp32_router.audit.files import Meter
from megatron_fp32_router.audit.huggingface import read_header, read_index
from megatron_fp32_router.audit.pickles import NUMPY_DTYPES
from megatron_fp32_router.audit.repair import RepairRefusedError, check_target
from megatron_fp32_router.audit.tensors import SERVED
from megatron_fp32_router.serving.export import config_in

if TYPE_CHECKING:
    from pathlib import Path

    from megatron_fp32_router.audit.tensors import Checkpoint, RouterTensor

#: What safetensors call the dtypes that --router-dtype takes.
_DTYPES: Final = {"float32": "F32", "bfloat16": "BF16"}

#: What an expert bias is called beside "….gate.weight", by architecture: for exports without any expert bias.
_BIAS_NAMES: Final = {
    "DeepseekV3ForCausalLM": "gate.e_score_correction_bias",
    "GlmMoeDsaForCausalLM": "gate.e_score_correction_bias",
    "Glm4MoeForCausalLM": "gate.e_score_correction_bias",
    "KimiLinearForCausalLM": "gate.e_score_correction_bias",
    "NemotronHForCausalLM": "gate.e_score_correction_bias",
    "MiniMaxM2ForCausalLM": "e_score_correction_bias",
    "BailingMoeV2ForCausalLM": "gate.expert_bias",
}


def fill(export: Checkpoint, trained: Checkpoint, out: Path, dtype: str) -> dict[str, Any]:
    """Copy an export into a new folder, with the router tensors of training. The original stays as it is.

    Args:
        export: of a folder with safetensors.
        trained: the training's checkpoint, which holds the tensors in fp32.
        out: the new folder.
        dtype: "float32" or "bfloat16", of every router tensor that is written.

    Returns:
        What repair.json says: {"export", "checkpoint", "dtype", "replaced": [name], "added": [name],
        "not_written": {name: why}}.

    Raises:
        RepairRefusedError: `export` is no folder of safetensors, or `out` cannot be used (`check_target`).
        CheckpointUnreadableError: a file of the export is damaged. Nothing has been written then.
        OSError: it cannot be written.
    """
    if export.format != "safetensors" or not export.path.is_dir() or trained.format == "safetensors":
        raise RepairRefusedError(
            f"--router-dtype takes the folder of an export to safetensors and, by --against, a training's checkpoint; "
            f"found {export.path} ({export.format}) and {trained.path} ({trained.format})"
        )
    check_target(out, export.path)
    here = {tensor.key: tensor for tensor in export.tensors}
    new: dict[str, Any] = {}
    not_written: dict[str, str] = {}
    for tensor in trained.tensors:
        if tensor.kind not in SERVED:
            continue
        values = tensor.values if tensor.dtype == "float32" else tensor.main
        there = here.get(tensor.key)
        name = _name_of(tensor, here, export.path) if there is None else there.name
        if values is None or values.dtype != np.float32:
            not_written[tensor.name] = f"it is {tensor.dtype} in the checkpoint, without an fp32 copy"
        elif name is None:
            not_written[tensor.name] = "the export has no router in this layer, or no known name for this tensor"
        elif there is not None and there.shape != tensor.shape:
            not_written[tensor.name] = f"its shape is {tensor.shape}, and {there.shape} in the export"
        else:
            new[name] = values.astype(NUMPY_DTYPES[dtype])
    names = {tensor.name for tensor in export.tensors}
    _copy(export.path, out, new, names)
    report = {
        "export": str(export.path),
        "checkpoint": str(trained.path),
        "dtype": dtype,
        "replaced": [name for name in new if name in names],
        "added": [name for name in new if name not in names],
        "not_written": not_written,
    }
    (out / "repair.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _name_of(tensor: RouterTensor, here: dict[tuple[str, int, str], RouterTensor], folder: Path) -> str | None:
    """The name for a tensor that the export lacks: as in another layer, else from the name of the layer's weight."""
    stack, layer, kind = tensor.key
    weight = here.get((stack, layer, "weight"))
    if weight is None:
        return None
    same = next((other.name for (s, _, k), other in here.items() if (s, k) == (stack, kind)), None)
    if same is not None:
        return re.sub(r"((?:^|\.)(?:layers|blocks|h)\.)\d+\.", rf"\g<1>{layer}.", same, count=1)
    config = folder / "config.json"
    ending = _BIAS_NAMES.get(config_in(config)["architectures"][0]) if config.is_file() else None
    if kind != "expert_bias" or ending is None or not weight.name.endswith(".gate.weight"):
        return None
    return weight.name.removesuffix("gate.weight") + ending


def _copy(folder: Path, out: Path, new: dict[str, Any], present: set[str]) -> None:
    """Copy a folder. A new tensor replaces the old one of its name, or goes into the file with its layer's router."""
    # All that can be damaged is read before anything is written.
    headers = {file: read_header(file) for file in sorted(folder.glob("*.safetensors"))}
    index = folder / "model.safetensors.index.json"
    root = read_index(index, Meter()) if index.is_file() else None
    out.mkdir(parents=True, exist_ok=True)
    added = [name for name in new if name not in present]
    homes: dict[str, str] = {}
    total = 0
    for file in sorted(folder.iterdir()):
        if file not in headers:
            if file.is_dir():
                shutil.copytree(file, out / file.name)
            else:
                shutil.copy2(file, out / file.name)
            continue
        with file.open("rb") as source, (out / file.name).open("wb") as target:
            start, header = headers[file]
            layers = {_layer(name) for name in header if name in present}
            here = [name for name in added if name not in homes and _layer(name) in layers]
            homes |= dict.fromkeys(here, file.name)
            wanted = {name: new[name] for name in [*header, *here] if name in new}
            total += _rewrite(source, start, header, target, wanted)
    if root is not None and new:
        root["weight_map"] |= homes
        metadata = root.get("metadata")
        if isinstance(metadata, dict) and "total_size" in metadata:
            metadata["total_size"] = total
        (out / index.name).write_text(json.dumps(root, indent=2) + "\n", encoding="utf-8")


def _layer(name: str) -> str:
    found = re.search(r"(?:^|\.)(?:layers|blocks|h)\.\d+\.", name)
    return name[: found.end()] if found else ""


def _rewrite(source: IO[bytes], start: int, header: dict[str, Any], target: IO[bytes], new: dict[str, Any]) -> int:
    """Copy a safetensors file tensor by tensor, with the `new` ones in it; return how many bytes its tensors have."""
    old = {name: said["data_offsets"] for name, said in header.items() if name != "__metadata__"}
    order = sorted(old, key=lambda name: old[name]) + [name for name in new if name not in old]
    at = 0
    for name in order:
        if name in new:
            header[name] = {"dtype": _DTYPES[new[name].dtype.name], "shape": list(new[name].shape)}
        size = new[name].nbytes if name in new else old[name][1] - old[name][0]
        header[name]["data_offsets"] = [at, at + size]
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    target.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        if name in new:
            target.write(np.ascontiguousarray(new[name]).tobytes())
            continue
        source.seek(start + old[name][0])
        left = old[name][1] - old[name][0]
        while left:
            part = source.read(min(left, 1 << 24))
            if not part:
                raise RepairRefusedError(f"{source.name}: ended inside {name} while it was copied; remove the copy")
            target.write(part)
            left -= len(part)
    return at
