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
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import megatron_fp32_router
from megatron_fp32_router import lab
from megatron_fp32_router.patching.gate import look
from megatron_fp32_router.patching.megatron import Megatron, read_version
from megatron_fp32_router.patching.record import Patch
from megatron_fp32_router.patching.records import PATCHES
from megatron_fp32_router.patching.registry import registry

#: Functions that torch or Python itself calls by these very names: nobody can rename them and go on training.
CALLED_BY_NAME = ("forward", "__init__")
FINALIZE = "megatron.core.distributed.finalize_model_grads"


#: Functions of these files are called where a training goes: they are renamed together with their callers. All the
#: others (optimizers, checkpoints, refusals) are renamed alone, and nothing is trained.
TRAINING = (
    "megatron.core.transformer.moe.router",
    "megatron.core.transformer.moe.moe_utils",
    FINALIZE,
)


def alone(patch: Patch) -> bool:
    return patch.module not in TRAINING or patch.path.rpartition(".")[2] in (*CALLED_BY_NAME, "_forward")


def trains(patch: Patch) -> bool:
    return patch.module in TRAINING and patch.path.rpartition(".")[2] not in CALLED_BY_NAME


@contextmanager
def renamed(tree: Path, patch: Patch) -> Iterator[None]:
    """Rename the target and its callers, which lie in the same file or in finalize_model_grads.py, while inside."""
    home, finalize = file_of(tree, patch.module), file_of(tree, FINALIZE)
    files = {home} if alone(patch) else {home, finalize}
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
    path = tree / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def text_with_another_name(patch: Patch, text: str, is_home: bool) -> str:
    owner, _, name = patch.path.rpartition(".")
    if alone(patch):
        return text_with_another_definition(owner, name, text)
    text = re.sub(rf"\b{name}\b", f"{name}_renamed", text)
    if is_home and f"def {name}_renamed(" not in text:
        # Imported here under the name that is the target: that name alone changes, at the import and below it.
        text = text.replace(f"{name}_renamed", f"{name} as {name}_renamed", 1)
    return text


def text_with_another_definition(owner: str, name: str, text: str) -> str:
    """Rename what defines `name`: a method, a function, or an import of it; or all that do so inside one `try`."""
    body: list[ast.stmt] = ast.parse(text).body
    if owner:
        (cls,) = (n for n in body if isinstance(n, ast.ClassDef) and n.name == owner)
        body = cls.body
    lines = text.splitlines(keepends=True)
    for node in [n for item in body for n in (ast.walk(item) if isinstance(item, ast.Try) else [item])]:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            lines[node.lineno - 1] = lines[node.lineno - 1].replace(f"{name} =", f"{name}_renamed =")
        if isinstance(node, ast.FunctionDef) and node.name == name:
            lines[node.lineno - 1] = lines[node.lineno - 1].replace(f"def {name}(", f"def {name}_renamed(")
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            if alias.name == name:
                start = alias.col_offset + len(name)
                line = lines[alias.lineno - 1]
                lines[alias.lineno - 1] = f"{line[:start]} as {name}_renamed{line[start:]}"
    return "".join(lines)


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


def use(patch: Patch) -> None:
    """Call what is in the place of a function that only some jobs use, in a process with a protected model."""
    model = torch.nn.Linear(1, 1)
    model.weight.kept_in_fp32_router = True  # type: ignore[assignment]
    registry.models.add(model)
    if patch.area != "router" and patch.id in registry.replacements:  # of a function of a module, the import tells
        registry.replacements[patch.id]()


def under_raise(patch: Patch) -> dict[str, Any]:
    import_module(patch.module)
    use(patch)
    return {"error": None}


def under_warn(patch: Patch) -> dict[str, Any]:
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logging.getLogger("megatron_fp32_router").addHandler(Keep())
    megatron_fp32_router.enable(on_mismatch="warn")
    # What is renamed alone may be imported by name elsewhere in Megatron, which then breaks by itself, afterwards.
    with nullcontext() if trains(patch) else suppress(ImportError):
        import_module(patch.module)
    loss, biases = None, []
    if trains(patch):
        recipe = lab.Recipe(layers=1, hidden=16, moe_ffn=16, seq_length=16)
        with lab.parallel(recipe):
            room = lab.build(recipe)
            biases = [str(router.expert_bias.dtype) for _, router in room.routers()]
            loss = room.step(lab.text_batches(recipe, seed=1))
    with suppress(TypeError):  # of the function itself, which has been called without its arguments
        use(patch)
    states = {record.id: record.state for record in megatron_fp32_router.status()}
    about = [line for line in said if patch.target in line]
    products = [line.partition("gating in ")[2] for line in said if "gating in " in line]
    return {"said": about, "state": states[patch.id], "loss": loss, "biases": biases, "products": products}


def main(tree: Path) -> None:
    torch.set_num_threads(1)
    # Two renamed versions of a file can have the same size and be written in the same second, which is all that Python
    # compares before it takes the bytecode that it has.
    sys.dont_write_bytecode = True
    lab.prepare(tree)
    megatron = Megatron(tree / "megatron/core", read_version(tree / "megatron/core/package_info.py"))
    found = {}
    for patch in PATCHES:
        here = look(patch, megatron, "").needless is None
        # Torch's own functions are not Megatron's to rename; no wheel holds megatron.legacy, and not every release
        # has every file.
        if not here or patch.inherited or not file_of(tree, patch.module).exists():
            continue
        # Without these a training is only slower, or nobody has asked for them.
        if not patch.essential or patch.monitor:
            continue
        with renamed(tree, patch):
            found[patch.id] = {
                "target": patch.target,
                "why": patch.why,
                "trains": trains(patch),
                "raise": in_a_fork(lambda patch=patch: under_raise(patch)),  # type: ignore[misc]
                "warn": in_a_fork(lambda patch=patch: under_warn(patch)),  # type: ignore[misc]
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
