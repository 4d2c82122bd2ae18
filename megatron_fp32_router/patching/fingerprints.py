"""What is known: for every release and every target, which body it has there; and bodies between releases, reviewed.

fingerprints.json is written by scripts/fingerprints and holds digests for deciding, and the normalised source of every
distinct body, compressed, for showing what changed. history.json says which bodies of commits between releases the
patches are right for, and why: groups of {digest: first commit that had it} under one sentence. A group without a
sentence has not been reviewed, and is not known.
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
HISTORY: Final = files(__package__) / "history.json"


@dataclass(frozen=True)
class Fingerprints:
    """The content of the generated file.

    Attributes:
        releases: the known releases, oldest first.
        targets: `module:path` -> for each release a number into `digests`, or None where it has no such definition.
        digests: the distinct bodies.
        history: `module:path` -> digest -> the first commit that had that body; reviewed ones only.
    """

    releases: tuple[str, ...]
    targets: dict[str, tuple[int | None, ...]]
    digests: tuple[str, ...]
    history: dict[str, dict[str, str]]
    compressed: str

    def digest(self, target: str, index: int) -> str | None:
        """The fingerprint of `target` in the release with that index; None where it has no such definition."""
        number = self.targets[target][index]
        return None if number is None else self.digests[number]

    def index(self, version: Version) -> int | None:
        """Which known release that is, or None."""
        spelt = str(version)
        return self.releases.index(spelt) if spelt in self.releases else None

    def digests_of(self, target: str) -> set[str | None]:
        """Every known fingerprint of `target`; None is one where a known release has no such definition."""
        row = {None if number is None else self.digests[number] for number in self.targets.get(target, ())}
        return row | self.history.get(target, {}).keys()

    def first_seen(self, target: str, digest: str | None) -> str:
        """The first commit that had that reviewed body."""
        return "no release" if digest is None else self.history[target][digest]

    def bodies(self, target: str) -> dict[str, str]:
        """digest -> normalised source, of every distinct body that is known of `target`."""
        texts = dict(zip(self.digests, json.loads(zlib.decompress(base64.b85decode(self.compressed))), strict=True))
        return {digest: texts[digest] for digest in sorted(d for d in self.digests_of(target) if d in texts)}

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
        {
            target: {digest: seen for why, bodies in groups if why for digest, seen in bodies.items()}
            for target, groups in json.loads(HISTORY.read_text(encoding="utf-8")).items()
        },
        content["bodies"],
    )


def pack(texts: list[str]) -> str:
    """The bodies as one line of text. Like ones stand side by side, which is what makes them small."""
    return base64.b85encode(zlib.compress(json.dumps(texts).encode(), 9)).decode()
