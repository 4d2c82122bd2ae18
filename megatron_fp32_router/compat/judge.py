"""The verdict on each target of a tree: is it what the patches were written for?"""

from __future__ import annotations

import ast
import copy
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from packaging.version import Version

from megatron_fp32_router.compat import canonical
from megatron_fp32_router.compat.contracts import key, relied_on
from megatron_fp32_router.compat.fingerprints import Fingerprints
from megatron_fp32_router.compat.source import Body, Tree
from megatron_fp32_router.records import PATCHES, Patch
from megatron_fp32_router.upstream import Megatron

State: TypeAlias = Literal["match", "known", "drifted", "missing"]

_CONTEXT_LINES: Final = 2


@dataclass(frozen=True)
class Target:
    """One function, method or class header that patches replace or rely on, and what a tree has there.

    Attributes:
        name: `module:path`.
        patches: ids of the patches that stand or fall with it.
        state: "match" (as in this release), "known" (as in another known release for which the same patches are
            right), "drifted" (as in no such release), "missing".
        detail: one sentence more.
        digest: the fingerprint that was found; None when there is no such definition.
        file: the path below the tree, and the line in it where the difference begins (0: no line).
        diff: what changed against the nearest known body, as a unified diff; empty unless drifted.
        accepted: whether the project has accepted exactly this drift.
        span: the first and last line of a drifted function in its file; (0, 0) for what is no function.
        patchable: whether a patch could be applied to what was found, so that a probe can tell whether it is right.
    """

    name: str
    patches: tuple[str, ...]
    state: State
    detail: str
    digest: str | None
    file: str
    line: int = 0
    diff: str = ""
    accepted: bool = False
    span: tuple[int, int] = (0, 0)
    patchable: bool = True

    @property
    def dotted(self) -> str:
        """The name as Python spells it."""
        return self.name.replace(":", ".")

    @property
    def fits(self) -> bool:
        """Whether the plugin is right for it."""
        return self.state in ("match", "known") or self.accepted


class Judge:
    """Compares a tree with the known releases.

    Args:
        tree: the source files.
        megatron: what `package_info.py` says of it. A version that is no known release is allowed; without one the
            tree counts as newer than all.
        accepted: target -> the fingerprint that the project has accepted there.
    """

    def __init__(self, tree: Tree, megatron: Megatron, accepted: Mapping[str, str] | None = None) -> None:
        self.tree = tree
        self.megatron = megatron
        self.accepted = accepted or {}
        self.fingerprints: Fingerprints = tree.fingerprints
        version = megatron.version
        self.index = None if version is None else self.fingerprints.index(version)
        self._nearest = self._nearest_releases(version)

    def all(self) -> list[Target]:
        """Every target, in the order of the records."""
        return [self.one(name, patches) for name, patches in relied_on().items()]

    def one(self, name: str, patches: tuple[str, ...], *, explain: bool = True) -> Target:
        """The verdict on one target.

        Args:
            explain: work out the diff too, which takes longer.

        Raises:
            UnreadableSourceError: its file cannot be read, parsed or compared.
        """
        with self.tree.not_too_deep(name):
            return self._one(name, patches, explain)

    def _one(self, name: str, patches: tuple[str, ...], explain: bool) -> Target:
        module, _, path = name.partition(":")
        file = self.tree.file_of(module)
        if not any(self.fingerprints.files.get(module, ())):
            return self._in_no_release(name, patches, file)
        if not self.tree.has(module) and any(self.fingerprints.files[module][i] is None for i in self._nearest):
            return Target(name, patches, "match", "not there, as is right for this release", None, file)
        body = self.tree.body(name)
        if self.index is not None and body.digest == self.fingerprints.digest(name, self.index):
            return Target(name, patches, "match", self._as_here(body), body.digest, file, body.line)
        if patches and all(_retired(patch, self.megatron) for patch in PATCHES if patch.id in patches):
            return Target(name, patches, "known", "no patch is for it in this version", body.digest, file, body.line)
        alike = self._compatible(name)
        same = [self.fingerprints.releases[i] for i in alike if self.fingerprints.digest(name, i) == body.digest]
        if body.digest is None:
            expected = [self.fingerprints.digest(name, i) for i in self._nearest]
            if None in expected:
                return Target(
                    name,
                    patches,
                    "known",
                    "not there, as in " + self._spelt(self.fingerprints.releases_with(name, None)),
                    None,
                    file,
                )
            line = self._parsed_line(module, path)
            return Target(name, patches, "missing", self._gone(module, path), None, file, line, patchable=False)
        if same:
            return Target(name, patches, "known", f"as in {self._spelt(same)}", body.digest, file, body.line)
        accepted = self.accepted.get(name) == body.digest
        if not explain:
            return Target(name, patches, "drifted", "", body.digest, file, body.line, accepted=accepted)
        return self._drifted(name, patches, file, alike, accepted)

    def _as_here(self, body: Body) -> str:
        return "" if body.digest is not None else "not there, as is right for this release"

    def _nearest_releases(self, version: Version | None) -> list[int]:
        """The releases that say which functions ought to exist: this one, or the last before this version.

        A pre-release may already have, or not yet have, what the release it leads to has.
        """
        if self.index is not None:
            return [self.index]
        count = len(self.fingerprints.releases)
        if version is None:
            return [count - 1]
        base = Version(version.base_version)
        below = [i for i, r in enumerate(self.fingerprints.releases) if Version(r) <= base] or [0]
        before = [i for i, r in enumerate(self.fingerprints.releases) if Version(r) < base] or [0]
        return sorted({below[-1], before[-1]}) if version.is_prerelease else [below[-1]]

    def _compatible(self, name: str) -> list[int]:
        """The releases whose body of this target would be right here: those in which the same patches replace it.

        0.12's constructor, which casts, is not right in a 0.13 tree: no patch is applied to it there.
        """
        here = _replacing(name, self.megatron)
        return [
            i
            for i, release in enumerate(self.fingerprints.releases)
            if _replacing(name, Megatron(None, Version(release))) == here
        ]

    def _in_no_release(self, name: str, patches: tuple[str, ...], file: str) -> Target:
        """A target in a module that no wheel contains (megatron.legacy): its parameters are all there is to compare."""
        module, _, path = name.partition(":")
        if not self.tree.has(module):
            return Target(name, patches, "match", "not part of this tree", None, file)
        body = self.tree.body(name)
        patch = next(patch for patch in PATCHES if key(patch.module, patch.path) == name)
        if body.module is None:
            if patch.optional and self.tree.body(key(module, path.partition(".")[0])).digest is None:
                return Target(name, patches, "match", "not part of this tree", None, file)
            return Target(name, patches, "missing", self._gone(module, path), None, file, patchable=False)
        function = body.module.body[-1]
        found = [a.arg for a in function.args.args] if isinstance(function, ast.FunctionDef) else []
        if tuple(found[: len(patch.parameters)]) == patch.parameters:
            return Target(
                name, patches, "known", "in no wheel: compared by its parameters", body.digest, file, body.line
            )
        detail = f"takes ({', '.join(found)}) where ({', '.join(patch.parameters)}, …) was expected"
        # Its parameters are what the patch needs to be applied at all: nothing that a probe could clear.
        return Target(name, patches, "drifted", detail, body.digest, file, body.line, patchable=False)

    def _drifted(self, name: str, patches: tuple[str, ...], file: str, alike: list[int], accepted: bool) -> Target:
        body = self.tree.body(name, parsed=True)
        assert body.module is not None
        here = canonical.lines(body.module)
        wanted = {self.fingerprints.digest(name, i) for i in alike} - {None}
        bodies = {digest: text for digest, text in self.fingerprints.bodies(name).items() if digest in wanted}
        elsewhere = self.fingerprints.releases_with(name, body.digest)
        if elsewhere:
            detail = f"is the body of {self._spelt(elsewhere)}, where other patches replace it than in {self.megatron}"
        elif not bodies:
            detail = "exists, which it does in no known release"
        else:
            detail = "as in no known release"
        if not bodies:
            diff = "".join(f"+{line}\n" for line in here)
            return Target(name, patches, "drifted", detail, body.digest, file, body.line, diff, accepted, body.span)
        expected = [self.fingerprints.digest(name, i) for i in self._nearest]
        # Printed by this Python, as what was found is: versions of Python differ in quotes and brackets.
        modules = {digest: canonical.normalised(ast.parse(text).body) for digest, text in bodies.items()}
        nearest = max(modules, key=lambda d: (_likeness(canonical.lines(modules[d]), here), d in expected))
        known = modules[nearest]
        label = self._spelt(self.fingerprints.releases_with(name, nearest))
        lines = difflib.unified_diff(
            canonical.lines(known),
            here,
            f"{name.partition(':')[2]} of {label}",
            f"{name.partition(':')[2]} of {self.megatron}, here",
            lineterm="",
            n=_CONTEXT_LINES,
        )
        line = canonical.first_difference(body.module, known) or body.line
        detail += f"; nearest is that of {label}, and line {line} differs first"
        diff = "\n".join(lines) + "\n"
        return Target(name, patches, "drifted", detail, body.digest, file, line, diff, accepted, body.span)

    def _spelt(self, releases: list[str]) -> str:
        return _spelt(releases, self.fingerprints.releases)

    def _gone(self, module: str, path: str) -> str:
        """That it does not exist, and what has the same body under another name."""
        owner, _, last = path.rpartition(".")
        digests = {self.fingerprints.digest(key(module, path), i) for i in range(len(self.fingerprints.releases))}
        for function in self._functions(module, owner):
            renamed = copy.deepcopy(function)
            renamed.name = last
            if canonical.digest(canonical.normalised([renamed])) in digests:
                there = f"{owner}.{function.name}" if owner else function.name
                return f"does not exist; {there} has its body"
        return "does not exist"

    def _functions(self, module: str, owner: str) -> list[ast.FunctionDef]:
        body = self.tree.parsed(module).body
        if owner:
            body = [
                item for node in body if isinstance(node, ast.ClassDef) and node.name == owner for item in node.body
            ]
        return [node for node in body if isinstance(node, ast.FunctionDef)]

    def _parsed_line(self, module: str, path: str) -> int:
        """Where the class of a missing method begins; 1 for what is missing from the module."""
        owner = path.rpartition(".")[0]
        lines = (n.lineno for n in self.tree.parsed(module).body if isinstance(n, ast.ClassDef) and n.name == owner)
        return next(lines, 1)


def _replacing(name: str, megatron: Megatron) -> list[str]:
    """Ids of the patches that replace this target in that Megatron."""
    return [patch.id for patch in PATCHES if key(patch.module, patch.path) == name and _for(patch, megatron)]


def _retired(patch: Patch, megatron: Megatron) -> bool:
    return patch.until is not None and megatron.at_least(patch.until)


def _for(patch: Patch, megatron: Megatron) -> bool:
    return megatron.at_least(patch.since) and not _retired(patch, megatron)


def _likeness(one: list[str], other: list[str]) -> float:
    return difflib.SequenceMatcher(None, one, other, autojunk=False).ratio()


def _spelt(releases: list[str], everything: tuple[str, ...]) -> str:
    """Runs of releases: `0.11.0, 0.17.0 to 0.19.2`."""
    runs: list[list[str]] = []
    for release in releases:
        follows = runs and everything.index(release) == everything.index(runs[-1][-1]) + 1
        if follows:
            runs[-1].append(release)
        else:
            runs.append([release])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
