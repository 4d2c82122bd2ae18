"""What `doctor` looks at in the interpreter that runs it. Nothing is imported: files and metadata are read."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import site
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from packaging.specifiers import SpecifierSet

from megatron_fp32_router import settings
from megatron_fp32_router.errors import SettingsError
from megatron_fp32_router.settings import PREFIX, VARIABLES

DISTRIBUTION: Final = "megatron-fp32-router"

#: The package, in a folder or in a zip.
HOME: Final = Path(__file__).resolve().parents[1]

#: What pyproject.toml asks for.
WRAPT: Final = SpecifierSet(">=1.17,<3")

#: From Python 3.15 a .start file is read, and the import line of the .pth file of that name is not (PEP 829).
STARTUP_FILE: Final = "megatron_fp32_router.start" if sys.version_info >= (3, 15) else "megatron_fp32_router.pth"


@dataclass(frozen=True)
class Library:
    """A library as this interpreter would import it: its version by its metadata, and where it lies."""

    name: str
    version: str | None
    path: str | None


@dataclass(frozen=True)
class Patcher:
    """A package that changes Megatron too.

    Attributes:
        name: what people call it.
        module: the package by which it is recognised.
        displaces: which of the plugin's targets it replaces or bypasses; read in its sources.
    """

    name: str
    module: str
    displaces: str


PATCHERS: Final = (
    Patcher("MindSpeed", "mindspeed", "replaces whole functions by its own copies once its features are on"),
    Patcher("MindSpeed-LLM", "mindspeed_llm", "has its own router and finalize_model_grads, which are not patched"),
    Patcher("Primus", "primus", "replaces _update_router_expert_bias, and TopKRouter by a class of its own"),
    Patcher("musa_patch", "musa_patch", "replaces functions of megatron.core at import"),
    Patcher("verl", "verl", "replaces TopKRouter.__init__ and .routing when it replays routing; counts by itself"),
    Patcher("ms-swift", "swift", "assigns forwards of its own to Megatron's classes at import"),
    Patcher("mcore-bridge", "mcore_bridge", "assigns forwards of its own to Megatron's classes at import"),
    Patcher("Megatron-Bridge", "megatron.bridge", "binds finalize_model_grads early, which the patches are made for"),
    Patcher("NeMo", "nemo", "binds finalize_model_grads early, which the patches are made for"),
    Patcher("NeMo RL", "nemo_rl", "wraps with a Float16Module of its own that derives from Megatron's"),
    Patcher("slime", "slime", "patches Megatron's source in its container image: `check` says whether that matters"),
)


def interpreter() -> dict[str, str]:
    """The Python that runs this."""
    flags = {"-S": sys.flags.no_site, "-I": sys.flags.isolated, "-E": sys.flags.ignore_environment}
    return {
        "executable": sys.executable,
        "version": ".".join(map(str, sys.version_info[:3])),
        "prefix": sys.prefix,
        "flags": " ".join(name for name, value in flags.items() if value),
    }


def installation() -> str:
    """How this copy got here: `installed`, `in place (editable)`, or `not installed` for one on the path."""
    for found in importlib.metadata.distributions(name=DISTRIBUTION):
        described = json.loads(found.read_text("direct_url.json") or "{}")
        editable = described.get("dir_info", {}).get("editable")
        root = unquote(urlsplit(described["url"]).path) if editable else str(found.locate_file(""))
        if Path(root).resolve() == HOME.parent:
            return "in place (editable)" if editable else "installed"
    return "not installed: found on the path only"


def other_copies() -> list[tuple[str, str]]:
    """(version, folder) of every copy of the package on the path but this one, in folders and in zips."""
    found: dict[Path, tuple[str, str]] = {}
    for entry in sys.path:
        spec = PathFinder.find_spec(HOME.name, [entry])
        if spec is None or spec.origin is None:
            continue
        folder = Path(spec.origin).parent
        try:
            content = spec.loader.get_data(str(folder / "version.py")).decode()  # type: ignore[union-attr]
        except OSError:
            content = ""
        version = re.search(r'__version__.*"(.+)"', content)
        found.setdefault(folder.resolve(), (version[1] if version else "of unknown version", str(folder)))
    found.pop(HOME, None)
    return list(found.values())


def site_folders() -> list[Path]:
    """The folders whose .pth and .start files this interpreter reads when it starts."""
    if sys.flags.no_site:
        return []
    folders = list(site.getsitepackages())
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    return [Path(folder) for folder in dict.fromkeys(folders)]


def startup() -> tuple[bool, str]:
    """Whether MEGATRON_FP32_ROUTER=1 has any effect in this interpreter, and why or why not."""
    if sys.flags.no_site:
        return False, "python -S reads no start-up files"
    importable = importlib.util.find_spec("_megatron_fp32_router_startup") is not None
    for folder in site_folders():
        if (folder / STARTUP_FILE).is_file():
            if importable:
                return True, str(folder / STARTUP_FILE)
            return False, f"{folder / STARTUP_FILE} is there, but _megatron_fp32_router_startup.py is not: reinstall"
    for entry in filter(None, sys.path):
        if (Path(entry) / STARTUP_FILE).is_file():
            return False, (
                f"{Path(entry) / STARTUP_FILE} is not read: PYTHONPATH and `pip install --target` folders are no site "
                "folders"
            )
    return False, f"no {STARTUP_FILE} in {', '.join(map(str, site_folders())) or 'any site folder'}"


def variables() -> tuple[list[tuple[str, str]], list[str]]:
    """The plugin's variables that are set, as (name, value), and a sentence for each that is wrong."""
    known = [(v.name, os.environ[v.name]) for v in VARIABLES if v.name in os.environ]
    wrong = settings.unknown_names()
    for look in (settings.switch, settings.from_environment):
        try:
            look()
        except SettingsError as error:
            wrong.append(str(error))
    return known, wrong


def switched() -> bool | None:
    """What MEGATRON_FP32_ROUTER says; None also for a value that is not accepted, which `variables` reports."""
    try:
        return settings.switch()
    except SettingsError:
        return None


def libraries() -> Iterator[Library]:
    """wrapt, packaging, torch and TransformerEngine."""
    for name in ("wrapt", "packaging", "torch"):
        yield _library(name, name, name)
    yield _library("TransformerEngine", "transformer_engine", "transformer-engine", "transformer-engine-torch")


def _library(name: str, module: str, *distributions: str) -> Library:
    for distribution in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return Library(name, importlib.metadata.version(distribution), _place(module))
    return Library(name, None, _place(module))


def _place(module: str) -> str | None:
    """Where a top-level package would be imported from; importing nothing."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None  # incomplete in sys.modules, which counts as missing
    if spec is None:
        return None
    return spec.origin or next(iter(spec.submodule_search_locations or ()), None)


def patchers() -> list[tuple[Patcher, str]]:
    """The known patchers that are installed here, and where."""
    found = []
    for patcher in PATCHERS:
        top, _, inner = patcher.module.partition(".")
        if inner:
            # Not find_spec of the whole name, which would import `megatron`.
            spec = importlib.util.find_spec(top)
            places = list(spec.submodule_search_locations or ()) if spec is not None else []
            place = next((str(Path(p) / inner) for p in places if (Path(p) / inner).is_dir()), None)
        else:
            place = _place(top)
        if place is not None:
            found.append((patcher, place))
    return found


def remedy() -> str:
    """What works where start-up files are not read."""
    return (
        "import megatron_fp32_router in the program, or start it with "
        f"`{Path(sys.executable).name} -m megatron_fp32_router run`; {PREFIX}=1 alone does nothing here"
    )
