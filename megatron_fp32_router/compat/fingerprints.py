"""The generated table: for every known release and every target, which body it has there.

fingerprints.json is written by scripts/fingerprints and holds digests for deciding, whole files' hashes for deciding
fast, and the normalised source of every distinct body, compressed, for showing what changed.
"""

from __future__ import annotations

import base64
import functools
import json
import zlib
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

from packaging.version import Version

#: Not by way of a path: the package may lie in a zip.
FILE: Final = files(__package__) / "fingerprints.json"


@dataclass(frozen=True)
class Fingerprints:
    """The content of the generated file.

    Attributes:
        releases: the known releases, oldest first.
        targets: `module:path` -> for each release a number into `digests`, or None where it has no such definition.
        digests: the distinct bodies.
        files: module -> for each release the sha256 of its file's bytes (the first 32 digits), or None.
    """

    releases: tuple[str, ...]
    targets: dict[str, tuple[int | None, ...]]
    digests: tuple[str, ...]
    files: dict[str, tuple[str | None, ...]]
    compressed: str

    def digest(self, target: str, index: int) -> str | None:
        """The fingerprint of `target` in the release with that index; None where it has no such definition."""
        number = self.targets[target][index]
        return None if number is None else self.digests[number]

    def index(self, version: Version) -> int | None:
        """Which known release that is, or None."""
        spelt = str(version)
        return self.releases.index(spelt) if spelt in self.releases else None

    def bodies(self, target: str) -> dict[str, str]:
        """digest -> normalised source, of every distinct body that `target` has in some release."""
        texts = json.loads(zlib.decompress(base64.b85decode(self.compressed)))
        numbers = dict.fromkeys(number for number in self.targets[target] if number is not None)
        return {self.digests[number]: texts[number] for number in numbers}

    def releases_with(self, target: str, digest: str | None) -> list[str]:
        """The known releases in which `target` has that body."""
        return [release for index, release in enumerate(self.releases) if self.digest(target, index) == digest]


@functools.cache
def known() -> Fingerprints:
    """The fingerprints of this version of the plugin."""
    content = json.loads(FILE.read_text(encoding="utf-8"))
    return Fingerprints(
        tuple(content["releases"]),
        {name: tuple(numbers) for name, numbers in content["targets"].items()},
        tuple(content["digests"]),
        {name: tuple(hashes) for name, hashes in content["files"].items()},
        content["bodies"],
    )


def pack(texts: list[str]) -> str:
    """The bodies as one line of text. Like ones stand side by side, which is what makes them small."""
    return base64.b85encode(zlib.compress(json.dumps(texts).encode(), 9)).decode()
