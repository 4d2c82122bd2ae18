"""Walk through a clone of NVIDIA/Megatron-LM: which commits fit, and which bodies has nobody reviewed?

What is read are the first-parent histories of main and dev since the branch point of 0.12, of dev's release branches
likewise, and of every other release branch since it left main. Files are taken from git and never checked out.
"""

from __future__ import annotations

import ast
import datetime
import difflib
import json
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bootstrap import ROOT

from megatron_fp32_router.patching import canonical, fingerprints, judge, source, targets
from megatron_fp32_router.patching.megatron import Megatron
from megatron_fp32_router.patching.record import USUAL

PAGE: Final = ROOT / "docs" / "commits.md"
_DEV: Final = ("dev", "core_dev_r0.15.0", "core_dev_r0.16.0")
_BRANCHES: Final = ("main", *_DEV, *(f"core_r0.{minor}.0" for minor in range(11, 20)))
_MODULES: Final = {name.partition(":")[0].replace(".", "/") for name in targets.relied_on()}
_PATHS: Final = {path for module in _MODULES for path in (f"{module}.py", f"{module}/__init__.py")}


@dataclass
class _Clone:
    """A clone, and what has been read from it."""

    path: Path
    parsed: dict[str, ast.Module] = field(default_factory=dict)
    bodies: dict[tuple[str, str], source.Body] = field(default_factory=dict)

    def git(self, *arguments: str) -> str:
        done = subprocess.run(["git", "-C", self.path, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"git {' '.join(arguments[:3])}: {done.stderr.strip()}")
        return done.stdout


@dataclass
class _Commit(source.Tree):
    """The tree of a commit: path -> blob, read from the clone when asked for."""

    clone: _Clone = field(default_factory=lambda: _Clone(Path()))
    blobs: dict[str, str] = field(default_factory=dict)

    def file_of(self, module: str) -> str:
        path = module.replace(".", "/")
        return f"{path}/__init__.py" if f"{path}/__init__.py" in self.blobs else f"{path}.py"

    def has(self, module: str) -> bool:
        return self.file_of(module) in self.blobs

    def parsed(self, module: str) -> ast.Module:
        if not self.has(module):
            raise source.UnreadableSourceError(f"{self.file_of(module)} is missing")
        blob = self.blobs[self.file_of(module)]
        if blob not in self.clone.parsed:
            content = self.clone.git("cat-file", "blob", blob).encode()
            self.clone.parsed[blob] = source.parse(Path(self.file_of(module)), content)
        return self.clone.parsed[blob]

    def body(self, target: str) -> source.Body:
        key = (self.blobs.get(self.file_of(target.partition(":")[0]), ""), target)
        if key not in self.clone.bodies:
            self.clone.bodies[key] = super().body(target)
        return self.clone.bodies[key]


@dataclass
class _State:
    """A run of commits in which no file of ours changed: the first of them, and how many there are a month."""

    first: str
    tree: _Commit
    months: Counter[str]
    unfit: list[judge.Target] = field(default_factory=list)

    @property
    def unfit_usually(self) -> list[judge.Target]:
        return [target for target in self.unfit if target.areas & set(USUAL)]


def _walk(clone: _Clone, branch: str) -> Iterator[_State]:
    head = f"refs/heads/{branch}"
    since = "refs/heads/core_r0.12.0" if branch in ("main", *_DEV) else head
    start = clone.git("merge-base", "refs/heads/main", since).strip()
    listed = (line.split() for line in clone.git("ls-tree", "-r", start).splitlines())
    blobs = {path: blob for _, _, blob, path in (fields for fields in listed if len(fields) == 4) if path in _PATHS}
    arguments = ("--first-parent", "--reverse", "--format=@%H %ct", "--raw", "--no-abbrev", "--no-renames", "-m")
    state: _State | None = None
    for entry in clone.git("log", *arguments, f"{start}..{head}").split("@")[1:]:
        title, *changes = entry.splitlines()
        commit, seconds = title.split()
        before = dict(blobs)
        for change in changes:
            what, _, path = change.partition("\t")
            if path in _PATHS:
                blobs.pop(path, None)
                if what.split()[4] != "D":
                    blobs[path] = what.split()[3]
        date = datetime.datetime.fromtimestamp(int(seconds), datetime.timezone.utc).date().isoformat()
        if state is None or blobs != before:
            if state is not None:
                yield state
            first = f"{branch} of {date} ({commit[:10]})"
            state = _State(first, _Commit(Path(), clone=clone, blobs=dict(blobs)), Counter())
        state.months[date[:7]] += 1
    if state is not None:
        yield state


def write(gitdir: Path, *, show: bool) -> dict[str, str]:
    """Bring history.json and docs/commits.md up to date; return digest -> source of the bodies that no release has."""
    clone = _Clone(gitdir)
    found = {branch: list(_walk(clone, branch)) for branch in _BRANCHES}
    states = [(state.tree, state.first) for walked in found.values() for state in walked]
    texts = _store(states, show=show)
    for state in (state for states in found.values() for state in states):
        judged = judge.Judge(state.tree, Megatron(None, None))
        verdicts = (judged.one(name, explain=False) for name in targets.relied_on())
        state.unfit = [verdict for verdict in verdicts if not verdict.fits]
    PAGE.write_text("\n".join(_page(found)) + "\n", encoding="utf-8")
    return texts


def read_fork(tree: Path, name: str, *, show: bool) -> dict[str, str]:
    """Add a tree's bodies to history.json under `name`; return digest -> source of those that no release has."""
    if not (tree / "megatron" / "core").is_dir():
        raise SystemExit(f"{tree} holds no megatron/core")
    return _store([(source.Tree(tree), name)], show=show)


def _store(trees: Iterable[tuple[source.Tree, str]], *, show: bool) -> dict[str, str]:
    """Add the bodies of trees, each with its name, that nobody has reviewed to history.json."""
    known = fingerprints.known()
    released = {number for row in known.targets.values() for number in row if number is not None}
    in_releases = {known.digests[number] for number in released}
    reviewed: dict[str, list[tuple[str, dict[str, str]]]] = {}
    for name, groups in json.loads(fingerprints.HISTORY.read_text(encoding="utf-8")).items():
        # A body that has come into a release is known by that.
        kept = [(why, {d: where for d, where in bodies.items() if d not in in_releases}) for why, bodies in groups]
        reviewed[name] = [(why, bodies) for why, bodies in kept if bodies]
    seen = {digest for groups in reviewed.values() for _, bodies in groups for digest in bodies}
    texts: dict[str, str] = {}
    for tree, called in trees:
        for name in filter(targets.has_body, targets.relied_on()):
            body = tree.body(name) if tree.has(name.partition(":")[0]) else source.Body(None)
            if body.digest is None or body.module is None or body.digest in in_releases:
                continue
            texts.setdefault(body.digest, canonical.text(body.module))
            if body.digest not in seen:
                seen.add(body.digest)
                reviewed.setdefault(name, []).append(("", {body.digest: called}))
                if show:
                    print(_difference(name, body.module, known.bodies(name).values(), called))
    reviewed = {name: groups for name, groups in reviewed.items() if groups}
    Path(str(fingerprints.HISTORY)).write_text(json.dumps(reviewed, indent=1) + "\n", encoding="utf-8")
    fingerprints.known.cache_clear()
    return texts


def _difference(name: str, module: ast.Module, known: Iterable[str], where: str) -> str:
    """What a body has that the nearest known one has not, as a unified diff."""
    here = canonical.lines(module)
    others = [canonical.lines(canonical.normalised(ast.parse(text).body)) for text in known]
    likeness = [difflib.SequenceMatcher(None, lines, here, autojunk=False).ratio() for lines in others]
    nearest = others[likeness.index(max(likeness))] if others else []
    return f"\n{name}\n" + "\n".join(difflib.unified_diff(nearest, here, "nearest known", where, lineterm="", n=2))


_INTRODUCTION: Final = """# Which commits between releases fit

Nothing in the tables is written by hand: `scripts/fingerprints --history GITDIR` makes them from a clone of
[NVIDIA/Megatron-LM](https://github.com/NVIDIA/Megatron-LM). A commit *fits* where every function that the patches
replace or rely on is a known one: a release's, or one that has been reviewed; `patching/history.json` has one sentence
for each group of reviewed bodies, and [check.md](check.md#commits) says what has been run. Counted are all commits of
the first-parent history since the branch point of 0.12; of a release branch, those since it left main. `usual` is what
`check` looks at by default, `all` is every area.
"""
_COUNTED: Final = "commits | fit, usual | fit, all |"


def _page(found: dict[str, list[_State]]) -> Iterator[str]:
    yield _INTRODUCTION
    yield f"## By branch\n\n| branch | {_COUNTED}\n| --- | --- | --- | --- |"
    for branch, states in found.items():
        yield f"| {branch} | {_counts(states)} |"
    for branch in ("main", "dev"):
        yield f"\n## {branch} by month\n\n| month | {_COUNTED}\n| --- | --- | --- | --- |"
        for month in sorted({month for state in found[branch] for month in state.months}):
            yield f"| {month} | {_counts(found[branch], month)} |"
    yield "\n## What does not fit\n"
    unfit: dict[tuple[str, str], list[_State]] = {}
    for branch, states in found.items():
        for state in states:
            names = ", ".join(f"`{target.dotted.removeprefix('megatron.core.')}`" for target in state.unfit)
            if names:
                unfit.setdefault((branch, names), []).append(state)
    yield (
        "| from | to | commits | what nobody has reviewed, or is not right |\n| --- | --- | --- | --- |"
        if unfit
        else "Nothing."
    )
    for (_, names), states in unfit.items():
        commits = sum(state.months.total() for state in states)
        yield f"| {states[0].first} | {states[-1].first.partition(' of ')[2]} | {commits} | {names} |"


def _counts(states: list[_State], month: str | None = None) -> str:
    """How many commits there are, and how many of them fit in the usual areas and in all."""
    sizes = [(state.months.total() if month is None else state.months[month], state) for state in states]
    usual = sum(size for size, state in sizes if not state.unfit_usually)
    everything = sum(size for size, state in sizes if not state.unfit)
    return f"{sum(size for size, _ in sizes)} | {usual} | {everything}"
