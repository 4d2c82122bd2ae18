"""What `check` has found out, and the verdict on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from megatron_fp32_router.patching.judge import Target
from megatron_fp32_router.patching.record import AREAS, USUAL
from megatron_fp32_router.patching.records import PATCHES
from megatron_fp32_router.version import __version__

if TYPE_CHECKING:
    from megatron_fp32_router.compat.probe import Outcome

Verdict: TypeAlias = Literal["fits", "does not fit", "unknown"]

EXIT_CODES: Final[dict[Verdict, int]] = {"fits": 0, "does not fit": 1, "unknown": 2}


@dataclass
class Report:
    """Everything that `check` has found out."""

    root: str | None
    version: str | None = None
    known_release: bool = False
    targets: list[Target] = field(default_factory=list)
    #: What the job uses, of patching.record.AREAS.
    areas: tuple[str, ...] = USUAL
    #: Other reasons why the plugin does not fit, beside the targets.
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    probe: Outcome | None = None
    #: Whether the user vouches for what the probe did not run.
    vouched: bool = False
    unknown: str = ""

    @property
    def unfit(self) -> list[Target]:
        """The targets that the job uses and that do not fit, except those that a passing probe has cleared."""
        return [t for t in self.targets if not t.fits and t not in self.proven and t.areas & set(self.areas)]

    def area(self, name: str) -> str:
        """Whether an area fits, and if not, what a training does about it."""
        drifted = [t for t in self.targets if not t.fits and name in t.areas]
        if all(t in self.proven for t in drifted):
            return "fits, proven by the probe" if drifted and not self.vouched else "fits"
        if name == "router":
            return "does not fit"
        stops = any(patch.essential for patch in PATCHES if patch.area == name)
        return "drifted, refused when used" if stops else "drifted, left out: slower"

    @property
    def proven(self) -> list[Target]:
        """What has drifted and ran in a probe that passed, or was vouched for."""
        if self.probe is None or not self.probe.passed:
            return []
        unproven = () if self.vouched else self.probe.unproven
        return [t for t in self.targets if t.state == "drifted" and t.name not in unproven]

    @property
    def verdict(self) -> Verdict:
        """Whether the plugin fits."""
        if self.unknown:
            return "unknown"
        failed = self.probe is not None and not self.probe.passed
        return "does not fit" if self.unfit or self.problems or failed else "fits"

    def to_json(self) -> dict[str, Any]:
        """What --json prints."""
        return {
            "megatron": {"path": self.root, "version": self.version},
            "plugin": __version__,
            "verdict": self.verdict,
            "reason": self.unknown or "; ".join(self.problems),
            "notes": self.notes,
            "areas": {name: self.area(name) for name in AREAS} if self.targets else {},
            "for": list(self.areas),
            "targets": [
                {
                    "target": t.dotted,
                    "state": t.state,
                    "detail": t.detail,
                    "patches": list(t.patches),
                    "file": t.file,
                    "line": t.line,
                    "accepted": t.accepted,
                    "diff": t.diff,
                }
                for t in self.targets
            ],
            "probe": None if self.probe is None else [vars(proof) for proof in self.probe.proofs],
        }
