"""The file in which a project records which changes in its Megatron it has accepted, and on what grounds.

`check --accept` writes it after a passing probe; the project commits it. It names fingerprints, so the next change in
one of those functions is a drift again. It is valid for the version of the plugin whose patches the probe tried.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from megatron_fp32_router.errors import SettingsError
from megatron_fp32_router.patching.judge import Target
from megatron_fp32_router.version import __version__

#: Where `check` writes and looks by default. A training looks only where its variable points: the launcher chooses its
#: working folder, and a file that changes what is checked must not be picked up by accident.
DEFAULT: Final = "megatron_fp32_router.accepted.json"


@dataclass(frozen=True)
class Accepted:
    """What an accepted file says.

    Attributes:
        path: the file, or None when there is none.
        targets: `module:path` -> accepted fingerprint. Empty also when the file is not honoured.
        why_not: why the file is not honoured, or an empty string.
    """

    path: Path | None = None
    targets: Mapping[str, str] = field(default_factory=dict)
    why_not: str = ""


def read(path: Path) -> Accepted:
    """Read an accepted file.

    Raises:
        SettingsError: it cannot be read, or is not such a file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"the accepted file {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"the accepted file {path} is not JSON: {error}") from error
    targets = content.get("targets") if isinstance(content, dict) else None
    if not isinstance(targets, dict) or not all(isinstance(digest, str) for digest in targets.values()):
        raise SettingsError(f"{path} is not a file that `megatron-fp32-router check --accept` wrote")
    if content.get("plugin") != __version__:
        return Accepted(
            path,
            why_not=f"{path} was written by version {content.get('plugin')} of the plugin; this is "
            f"{__version__}, whose patches that probe did not try. Run `megatron-fp32-router check --accept` again.",
        )
    return Accepted(path, targets)


def write(path: Path, version: str, targets: Iterable[Target], proofs: Mapping[str, str]) -> None:
    """Record the drifted ones among `targets`, with the sentences of the probe that proved them harmless.

    Raises:
        OSError: the file cannot be written.
    """
    content = {
        "about": "Written by `megatron-fp32-router check --accept`: changes in Megatron's source that a probe has "
        "proven harmless to the plugin. Commit it, and set MEGATRON_FP32_ROUTER_ACCEPTED to its path for training.",
        "plugin": __version__,
        "megatron": version,
        "targets": {target.name: target.digest for target in targets if target.state == "drifted"},
        "probe": dict(proofs),
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
