"""python renamed.py TREE: rename each function that the plugin patches, in a copy of a Megatron, and see what it says.

TREE is that copy; its files are moved aside and put back. One process imports torch once and forks for every try:
what a user starts anew each time. Prints one JSON object: patch id -> what was seen.
"""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import megatron_fp32_router
from megatron_fp32_router import lab
from megatron_fp32_router.records import PATCHES, Patch
from megatron_fp32_router.upstream import Megatron, read_version

#: Functions that torch or Python itself calls by these very names: nobody can rename them and go on training.
CALLED_BY_NAME = ("forward", "__init__")
FINALIZE = "megatron.core.distributed.finalize_model_grads"


#: Functions whose callers live elsewhere: these are renamed alone. Training does without the last three.
ALONE = (*CALLED_BY_NAME, "_forward", "sharded_state_dict", "get_parameter_state_dp_zero")


@contextmanager
def renamed(tree: Path, patch: Patch) -> Iterator[None]:
    """Rename the target and its callers, which lie in the same file or in finalize_model_grads.py, while inside."""
    home, finalize = file_of(tree, patch.module), file_of(tree, FINALIZE)
    files = {home} if patch.path.rpartition(".")[2] in ALONE else {home, finalize}
    changed = {file: text_with_another_name(patch, file.read_text(encoding="utf-8"), file == home) for file in files}
    for file, text in changed.items():
        # Moved aside, not written over: it may be a link to the release itself.
        file.rename(file.with_suffix(".aside"))
        file.write_text(text, encoding="utf-8")
    try:
        yield
    finally:
        for file in changed:
            file.with_suffix(".aside").replace(file)


def file_of(tree: Path, module: str) -> Path:
    return tree / (module.replace(".", "/") + ".py")


def text_with_another_name(patch: Patch, text: str, is_home: bool) -> str:
    owner, _, name = patch.path.rpartition(".")
    if name in ALONE:
        (cls,) = (n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == owner)
        (function,) = (n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == name)
        lines = text.splitlines(keepends=True)
        lines[function.lineno - 1] = lines[function.lineno - 1].replace(f"def {name}(", f"def {name}_renamed(")
        return "".join(lines)
    text = re.sub(rf"\b{name}\b", f"{name}_renamed", text)
    if is_home and f"def {name}_renamed(" not in text:
        # Imported here under the name that is the target: that name alone changes, at the import and below it.
        text = text.replace(f"{name}_renamed", f"{name} as {name}_renamed", 1)
    return text


def in_a_fork(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    sys.stdout.flush()
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            answer = function()
        except BaseException as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = json.loads(pipe.read())
    os.wait()
    return answer


def under_raise(patch: Patch) -> dict[str, Any]:
    import_module(patch.module)
    return {"error": None}


def under_warn(patch: Patch) -> dict[str, Any]:
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logging.getLogger("megatron_fp32_router").addHandler(Keep())
    megatron_fp32_router.enable(on_mismatch="warn")
    import_module(patch.module)
    loss = None
    if patch.path.rpartition(".")[2] not in CALLED_BY_NAME:
        recipe = lab.Recipe(layers=1, hidden=16, moe_ffn=16, seq_length=16)
        with lab.parallel(recipe):
            loss = lab.build(recipe).step(lab.text_batches(recipe, seed=1))
    states = {record.id: record.state for record in megatron_fp32_router.status()}
    return {"said": [line for line in said if patch.target in line], "state": states[patch.id], "loss": loss}


def main(tree: Path) -> None:
    torch.set_num_threads(1)
    lab.prepare(tree)
    megatron = Megatron(tree / "megatron/core", read_version(tree / "megatron/core/package_info.py"))
    found = {}
    for patch in PATCHES:
        here = megatron.at_least(patch.since) and not (patch.until and megatron.at_least(patch.until))
        # Torch's own functions are not Megatron's to rename; no wheel holds megatron.legacy.
        if not here or patch.inherited or not patch.module.startswith("megatron.core."):
            continue
        with renamed(tree, patch):
            found[patch.id] = {
                "target": patch.target,
                "why": patch.why,
                "trains": patch.path.rpartition(".")[2] not in CALLED_BY_NAME,
                "raise": in_a_fork(lambda patch=patch: under_raise(patch)),  # type: ignore[misc]
                "warn": in_a_fork(lambda patch=patch: under_warn(patch)),  # type: ignore[misc]
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
