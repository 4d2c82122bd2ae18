"""The verdict on each target of a tree: is it what the patches were written for?"""

from __future__ import annotations

import ast
import copy
import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from packaging.version import Version

from megatron_fp32_router.patching import canonical
from megatron_fp32_router.patching.fingerprints import Fingerprints, known
from megatron_fp32_router.patching.megatron import Megatron
from megatron_fp32_router.patching.record import MOE_UTILS, ROUTER, Needless, Patch
from megatron_fp32_router.patching.records import PATCHES
from megatron_fp32_router.patching.source import Body, Tree
from megatron_fp32_router.patching.targets import has_body, relied_on

State: TypeAlias = Literal["match", "known", "drifted", "missing"]

_CONTEXT_LINES: Final = 2

#: Methods that the router of every Megatron has, from before 0.11 on.
_ALWAYS: Final = ("__init__", "routing", "forward")


@dataclass(frozen=True)
class Target:
    """One function, method or class header that patches replace or rely on, and what a tree has there.

    Attributes:
        name: `module:path`.
        state: "match" (as in this release), "known" (as in another Megatron for which the patches have been reviewed),
            "drifted" (as in none), "missing".
        detail: one sentence more.
        digest: the fingerprint that was found; None when there is no such definition.
        file: the path below the tree, and the line in it where the difference begins (0: no line).
        diff: what changed against the nearest known body, as a unified diff; empty unless drifted.
        accepted: whether the project has accepted exactly this drift.
        span: the first and last line of a drifted function in its file; (0, 0) for what is no function.
        patchable: whether a patch could be applied to what was found, so that a probe can tell whether it is right.
    """

    name: str
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
    def patches(self) -> tuple[str, ...]:
        """Ids of the patches that replace it or rely on it."""
        return relied_on()[self.name]

    @property
    def areas(self) -> frozenset[str]:
        """What a job has to use for this to matter, of patching.record.AREAS."""
        return frozenset(patch.area for patch in PATCHES if patch.id in self.patches)

    @property
    def fits(self) -> bool:
        """Whether the plugin is right for it."""
        return self.state in ("match", "known") or self.accepted


class Judge:
    """Compares a tree with what is known.

    Args:
        tree: the source files.
        megatron: what `package_info.py` says of it. Only the words of messages depend on it: the version that a commit
            between two releases names may be wrong.
        accepted: target -> the fingerprint that the project has accepted there.
    """

    def __init__(self, tree: Tree, megatron: Megatron, accepted: Mapping[str, str] | None = None) -> None:
        self.tree = tree
        self.megatron = megatron
        self.accepted = accepted or {}
        self.fingerprints: Fingerprints = known()
        self.index = None if megatron.version is None else self.fingerprints.index(megatron.version)

    def all(self) -> list[Target]:
        """Every target, in the order of the records."""
        return [self.one(name) for name in relied_on()]

    def one(self, name: str, *, explain: bool = True) -> Target:
        """The verdict on one target.

        Args:
            explain: work out the diff too, which takes longer.

        Raises:
            UnreadableSourceError: its file cannot be read, parsed or compared.
        """
        with self.tree.not_too_deep(name):
            return self._one(name, explain)

    def needless(self, patch: Patch) -> Needless | None:
        """Why this tree needs no such patch, asked of its code; None where the patch is for it.

        Raises:
            UnreadableSourceError: a file cannot be read, parsed or compared, or one that every Megatron has is missing.
        """
        name, module = patch.key, patch.module
        there = self.tree.has(module)
        if not there and patch.area != "router":
            return "absent"  # nothing can use it
        if not patch.inherited and (not there or self.tree.body(name).digest is None):
            holds = any(self.tree.holds(fact, module) for fact in patch.absent_where)
            return "absent" if holds else None
        return "native" if any(self.tree.holds(fact, module) for fact in patch.native_where) else None

    def another_release(self) -> str | None:
        """The release line that fits more functions of this tree than the line it claims; None when the claim is right.

        A line without a known release (the tree is a commit on the way to it) cannot be compared.
        """
        own = None if self.megatron.version is None else self.megatron.version.release[:2]
        here = {name: self._digest(name) for name in self.fingerprints.targets}
        counts: dict[tuple[int, ...], int] = {}
        for index, release in enumerate(self.fingerprints.releases):
            line = Version(release).release[:2]
            agree = sum(self.fingerprints.digest(name, index) == digest for name, digest in here.items())
            counts[line] = max(counts.get(line, 0), agree)
        best = max(counts, key=lambda line: counts[line])
        return ".".join(map(str, best)) if own in counts and counts[own] < counts[best] else None

    def has_no_expert_bias(self) -> bool:
        """Whether its router is complete and older than any that the plugin is for."""
        there = all(self.tree.has(ROUTER) and self.tree.body(f"{ROUTER}:TopKRouter.{name}").digest for name in _ALWAYS)
        return there and self.tree.holds("TopKRouter.__init__ lacks expert_bias", ROUTER)

    def cut_short(self, targets: Sequence[Target]) -> list[str]:
        """Files that seem truncated: what they hold matches, and the rest is missing."""
        gone, drifted = (Counter(t.file for t in targets if t.state == state) for state in ("missing", "drifted"))
        # One may have drifted: the function in the middle of which the file ends.
        return [file for file, number in gone.items() if number > 2 and drifted[file] < 2]

    def router_commit(self) -> str:
        """The commit since which the router is as in this tree: `main since 2026-06-12 (277c4f8040)`.

        That of the latest body that only commits between releases have; "" when there is none.
        """
        found = []
        for name in self.fingerprints.history:
            if name.startswith((ROUTER, MOE_UTILS)):
                seen = self.fingerprints.history[name].get(str(self._digest(name)), "")
                branch, _, commit = seen.partition(" of ")
                found.append((commit, branch))
        commit, branch = max(found)
        return f"{branch} since {commit}" if commit else ""

    def _digest(self, name: str) -> str | None:
        return self.tree.body(name).digest if self.tree.has(name.partition(":")[0]) else None

    def _one(self, name: str, explain: bool) -> Target:
        module, _, path = name.partition(":")
        file = self.tree.file_of(module)
        own = [patch for patch in PATCHES if patch.key == name]
        # If no patch replaces anything in the module, the patches that rely on it count.
        asked = own or ([] if self.tree.has(module) else [p for p in PATCHES if p.id in relied_on()[name]])
        if asked and all(self.needless(patch) == "absent" for patch in asked):
            return Target(name, "match", "not there, as is right for this tree", None, file)
        body = self.tree.body(name)
        recorded = self.fingerprints.digests_of(name)
        if body.digest is None and (None not in recorded or any(not patch.inherited for patch in own)):
            line = self._parsed_line(module, path)
            return Target(name, "missing", self._gone(module, path), None, file, line, patchable=False)
        if not has_body(name):
            return self._by_facts(name, own, body, file)
        elsewhere = self._taken_from_elsewhere(name)
        if elsewhere is not None:
            return elsewhere
        if self.index is not None and body.digest == self.fingerprints.digest(name, self.index):
            return Target(name, "match", "", body.digest, file, body.line)
        if body.digest in recorded:
            detail = f"as in {self._where(name, body.digest)}"
            return Target(name, "known", detail, body.digest, file, body.line)
        accepted = self.accepted.get(name) == body.digest
        if not explain:
            return Target(name, "drifted", "", body.digest, file, body.line, accepted=accepted)
        return self._drifted(name, file, accepted)

    def _by_facts(self, name: str, own: list[Patch], body: Body, file: str) -> Target:
        """A target of which the patches rely on the parameters, and on what `uses` says, and on nothing else."""
        assert body.module is not None
        last = body.module.body[-1]
        found = [argument.arg for argument in last.args.args] if isinstance(last, ast.FunctionDef) else []
        for patch in own:
            if tuple(found[: len(patch.signature)]) != patch.signature:
                detail = f"takes ({', '.join(found)}) where ({', '.join(patch.signature)}, …) was expected"
                # Its parameters are what the patch needs to be applied at all: nothing that a probe could clear.
                return Target(name, "drifted", detail, body.digest, file, body.line, patchable=False)
            broken = [fact for fact in patch.uses if not self.tree.holds(fact, patch.module)]
            if broken:
                detail = f"no longer as the patch expects: {broken[0]}"
                accepted = self.accepted.get(name) == body.digest
                return Target(name, "drifted", detail, body.digest, file, body.line, "", accepted, body.span)
        state: State = "known" if self.index is None else "match"
        return Target(name, state, "judged by its parameters", body.digest, file, body.line)

    def _taken_from_elsewhere(self, name: str) -> Target | None:
        """Drifted, where a patched module calls this function by name and gets it from another place than is known.

        The function may be what it was; what runs is another one.
        """
        home, _, path = name.partition(":")
        users = dict.fromkeys(patch.module for patch in PATCHES if patch.id in relied_on()[name])
        for module in (user for user in users if user != home and self.tree.has(user)):
            for called, full in ((path, f"{home}.{path}"), (home.rpartition(".")[2], home)):
                body = self.tree.body(f"{module}:{called}")
                for node in [] if body.module is None else body.module.body:
                    other = canonical.imported(node)
                    if other != full:
                        file = self.tree.file_of(module)
                        detail = f"{file} has {called} from {other or 'itself'}, where {full} was expected"
                        diff = "".join(f"+{line}\n" for line in ast.unparse(node).splitlines())
                        accepted = self.accepted.get(name) == body.digest
                        return Target(name, "drifted", detail, body.digest, file, node.lineno, diff, accepted)
        return None

    def _drifted(self, name: str, file: str, accepted: bool) -> Target:
        body = self.tree.body(name)
        assert body.module is not None
        here = canonical.lines(body.module)
        # Printed by this Python, as what was found is: versions of Python differ in quotes and brackets.
        bodies = self.fingerprints.bodies(name)
        modules = {digest: canonical.normalised(ast.parse(text).body) for digest, text in bodies.items()}
        if not modules:
            detail = "exists, which it does in no known Megatron"
            diff = "".join(f"+{line}\n" for line in here)
            return Target(name, "drifted", detail, body.digest, file, body.line, diff, accepted, body.span)
        expected = None if self.index is None else self.fingerprints.digest(name, self.index)
        nearest = max(modules, key=lambda d: (_likeness(canonical.lines(modules[d]), here), d == expected))
        known, label = modules[nearest], self._where(name, nearest)
        lines = difflib.unified_diff(
            canonical.lines(known),
            here,
            f"{name.partition(':')[2]} of {label}",
            f"{name.partition(':')[2]} of {self.megatron}, here",
            lineterm="",
            n=_CONTEXT_LINES,
        )
        line = canonical.first_difference(body.module, known) or body.line
        detail = f"as in no known Megatron; nearest is that of {label}, and line {line} differs first"
        diff = "\n".join(lines) + "\n"
        return Target(name, "drifted", detail, body.digest, file, line, diff, accepted, body.span)

    def _where(self, name: str, digest: str | None) -> str:
        """Where a known body is found: `0.11.0, 0.17.0 to 0.19.2`, or the first commit that had it."""
        releases = self.fingerprints.releases_with(name, digest)
        return _spelt(releases, self.fingerprints.releases) if releases else self.fingerprints.first_seen(name, digest)

    def _gone(self, module: str, path: str) -> str:
        """That it does not exist, and what has the same body under another name."""
        owner, _, last = path.rpartition(".")
        digests = self.fingerprints.digests_of(f"{module}:{path}")
        for function in self._functions(module, owner):
            renamed = copy.deepcopy(function)
            renamed.name = last
            if canonical.digest(canonical.normalised([renamed])) in digests:
                there = f"{owner}.{function.name}" if owner else function.name
                return f"does not exist; {there} has its body"
        return "does not exist"

    def _functions(self, module: str, owner: str) -> list[ast.FunctionDef]:
        """The functions of a module, or of its class `owner`."""
        body = self.tree.parsed(module).body
        if owner:
            body = [item for node in self._classes(module, owner) for item in node.body]
        return [node for node in body if isinstance(node, ast.FunctionDef)]

    def _parsed_line(self, module: str, path: str) -> int:
        """Where the class of a missing method begins; 1 for what is missing from the module."""
        return next((node.lineno for node in self._classes(module, path.rpartition(".")[0])), 1)

    def _classes(self, module: str, name: str) -> list[ast.ClassDef]:
        return [node for node in self.tree.parsed(module).body if isinstance(node, ast.ClassDef) and node.name == name]


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
