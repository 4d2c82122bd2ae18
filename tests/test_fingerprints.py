"""Fingerprints: what counts and what does not, the same under every Python, and a generated file that is up to date."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from bootstrap import NEWEST, RELEASES, ensure_release
from installing import pythons
from packaging.version import Version

from megatron_fp32_router.patching import canonical, drift, fingerprints, gate
from megatron_fp32_router.patching.fingerprints import FILE, HISTORY, known
from megatron_fp32_router.patching.megatron import Megatron
from megatron_fp32_router.patching.records import PATCHES
from megatron_fp32_router.patching.source import Tree
from megatron_fp32_router.patching.targets import has_body, relied_on

ROOT = Path(__file__).resolve().parent.parent


def digest(source: str, path: str = "f", module: str = "package.module") -> str | None:
    found = canonical.definitions(ast.parse(textwrap.dedent(source)), module, path)
    return canonical.digest(canonical.normalised(found)) if found else None


PLAIN = """
def f(a, b=1):
    x = a + b
    return f'{x}: {a}'
"""


@pytest.mark.parametrize(
    "other",
    [
        "def f(a: int, b: 'int' = 1) -> str:\n    x = a + b\n    return f'{x}: {a}'",
        "def f(a, b=1):\n    '''What it does.'''\n    x = a + b  # why\n    return f'{x}: {a}'",
        "def f(\n    a,\n    b=1,\n):\n    x: int\n    x: int = (a + b)\n\n    return (f'{x}' f': ' f'{a}')",
        'def f(a, b=1):\n    x = a + b; return f"{x}: {a}"',
    ],
)
def test_docstrings_comments_layout_quotes_and_annotations_do_not_count(other: str) -> None:
    assert digest(other) == digest(PLAIN)


@pytest.mark.parametrize(
    "other",
    [
        PLAIN.replace("b=1", "b=2"),
        PLAIN.replace("b=1", "*, b=1"),
        PLAIN.replace("b=1", "b=True"),
        PLAIN.replace("a + b", "b + a"),
        PLAIN.replace("a + b", "a - b"),
        PLAIN.replace("def f", "@cached\ndef f"),
        PLAIN.replace("def f", "async def f"),
        PLAIN.replace(": {a}", ": {a!r}"),
        PLAIN.replace("    x =", "    log()\n    x ="),
        "if NEW:\n" + textwrap.indent(PLAIN.strip(), "    "),
        PLAIN + "f = faster(f)\n",
        PLAIN + "\ntry:\n    from fast import f\nexcept ImportError:\n    pass\n",
    ],
)
def test_everything_else_counts(other: str) -> None:
    assert digest(other) not in (digest(PLAIN), None)


def test_a_function_of_nothing_but_a_docstring_is_one_that_passes() -> None:
    assert digest("def f():\n    '''Later.'''") == digest("def f():\n    pass")


def test_an_imported_name_counts_by_where_it_comes_from() -> None:
    relative = digest("from .other import f", module="package.module")
    assert relative == digest("from package.other import f")
    assert relative != digest("from package.another import f")


def test_of_a_class_only_the_header_counts_and_methods_are_found_in_it() -> None:
    source = "class C(Base):\n    def f(self): return {}"
    assert digest(source.format(1), "C") == digest(source.format(2), "C")
    assert digest(source.format(1), "C") != digest(source.format(1).replace("Base", "Other"), "C")
    assert digest(source.format(1), "C.f") != digest(source.format(2), "C.f")
    assert digest(source.format(1), "C.g") is None
    assert digest(source.format(1) + "\nC.f = g", "C.f") != digest(source.format(1), "C.f")
    assert digest(source.format(1) + "\nC.f = g", "C") == digest(source.format(1), "C")


def test_the_line_of_the_first_difference_is_a_line_of_the_source() -> None:
    here, there = (canonical.normalised(ast.parse(text).body) for text in (PLAIN.replace("{a}'", "{b}'"), PLAIN))
    assert canonical.first_difference(here, there) == 4
    assert canonical.first_difference(there, there) is None


#: Loads canonical.py alone, which imports nothing but the standard library.
PROGRAM = """
import ast, base64, importlib.util, json, os, sys, zlib
spec = importlib.util.spec_from_file_location("canonical", sys.argv[1])
canonical = importlib.util.module_from_spec(spec)
spec.loader.exec_module(canonical)
content = json.load(open(sys.argv[2], encoding="utf-8"))
wrong = []
for digest, text in zip(content["digests"], json.loads(zlib.decompress(base64.b85decode(content["bodies"])))):
    if canonical.digest(canonical.normalised(ast.parse(text).body)) != digest:
        wrong.append(text)
compared = 0
for index, tree in json.loads(sys.argv[3]).items():
    for target, numbers in content["targets"].items():
        module, _, path = target.partition(":")
        name = module.replace(".", "/")
        if os.path.isdir(f"{tree}/{name}"):
            name, module = f"{name}/__init__", f"{module}.__init__"
        # What the tree has no file for must have no fingerprint.
        here = os.path.exists(f"{tree}/{name}.py")
        source = open(f"{tree}/{name}.py", "rb").read() if here else b""
        found = canonical.definitions(ast.parse(source), module, path)
        number = numbers[int(index)]
        expected = None if number is None else content["digests"][number]
        if (canonical.digest(canonical.normalised(found)) if found else None) != expected:
            wrong.append(target)
        compared += 1
print(json.dumps([wrong, compared]))
"""


@pytest.mark.parametrize("version", sorted(pythons()))
def test_every_python_computes_the_same_fingerprints(version: str) -> None:
    # From every body as it is stored, and from the sources of the oldest and the newest release.
    trees = {RELEASES.index(release): str(ensure_release(release)) for release in (RELEASES[0], NEWEST)}
    done = subprocess.run(
        [pythons()[version], "-I", "-c", PROGRAM, canonical.__file__, str(FILE), json.dumps(trees)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    wrong, compared = json.loads(done.stdout)
    assert wrong == []
    assert compared > 100


def test_the_generated_file_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/fingerprints", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr  # which also says what it had to fetch


def test_every_target_of_every_patch_has_fingerprints() -> None:
    assert {name for name in relied_on() if has_body(name)} == set(known().targets)
    assert {patch for patches in relied_on().values() for patch in patches} == {patch.id for patch in PATCHES}


def test_what_a_patch_needs_lives_in_the_same_module() -> None:
    modules = {patch.id: patch.module for patch in PATCHES}
    assert all(modules[needed] == patch.module for patch in PATCHES for needed in patch.needs)


def test_the_generated_file_stays_small() -> None:
    assert FILE.stat().st_size < 200_000


# What is known beside the releases --------------------------------------------------------------------------------


def test_every_body_between_releases_has_a_sentence_a_commit_and_a_text() -> None:
    for target, groups in json.loads(HISTORY.read_text(encoding="utf-8")).items():
        assert has_body(target), target
        texts = known().bodies(target)
        for why, bodies in groups:
            assert why, f"{target}: nobody has said why the patches are right for {bodies}"
            assert bodies.keys() <= texts.keys()
            # A commit of upstream's, or a framework's changes to one.
            shape = r"\S+ of \d{4}-\d\d-\d\d \(([0-9a-f]{10}|\S+ and its (megatron\.patch|patches))\)"
            assert all(re.fullmatch(shape, seen) for seen in bodies.values())


def test_a_body_that_nobody_has_reviewed_is_not_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = "megatron.core.transformer.moe.router:Router.gating"
    file = tmp_path / "history.json"
    monkeypatch.setattr(fingerprints, "HISTORY", file)
    for why in ("", "the same product"):
        file.write_text(json.dumps({target: [[why, {"d" * 32: "main of 2026-01-01 (0123456789)"}]]}))
        assert ("d" * 32 in known.__wrapped__().digests_of(target)) is bool(why)


@pytest.mark.parametrize(
    ("fact", "holds"),
    [
        ("C.f uses attribute", True),
        ("C.f uses keyword", True),
        ("C.f uses parameter", True),
        ("C.f uses text", True),
        ("C.f uses comment", False),
        ("C.f lacks attribute", False),
        ("C.f lacks comment", True),
        ("C.gone lacks attribute", True),
        ("C.gone uses attribute", False),
        ("no D", True),
        ("no C", False),
        ("other:f lacks attribute", True),
    ],
)
def test_facts_about_the_source(fact: str, holds: bool, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        "class C:\n    def f(self, parameter):\n        return self.attribute(keyword='text')  # comment\n"
    )
    (tmp_path / "other.py").write_text("def f(): pass\n")
    assert Tree(tmp_path).holds(fact, "module") is holds


def test_for_every_release_what_the_records_say_of_it_is_what_its_code_says() -> None:
    for release in RELEASES:
        core = ensure_release(release) / "megatron" / "core"
        megatron = Megatron(core, Version(release))
        for patch in PATCHES:
            finding = gate.look(patch, megatron, "")
            assert finding.objection is None, (release, patch.id)
            documented = Version(release) >= Version(patch.since) and not (
                patch.until and Version(release) >= Version(patch.until)
            )
            in_no_wheel = patch.module.startswith("megatron.legacy")
            assert (finding.needless is None) == (documented and not in_no_wheel), (release, patch.id)


def test_the_gate_answers_for_a_known_file_as_it_would_after_parsing_it() -> None:
    for release in (RELEASES[0], "0.14.0", NEWEST):
        megatron = Megatron(ensure_release(release) / "megatron" / "core", Version(release))
        for patch in PATCHES:
            assert gate.look(patch, megatron, "") == gate.Finding(*drift.answer(patch, megatron, "")), (
                release,
                patch.id,
            )
