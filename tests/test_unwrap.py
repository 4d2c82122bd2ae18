"""Patches come off as they went on, with the newest wrapt and with the oldest that pyproject.toml allows."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import wrapt
from bootstrap import NEWEST, ensure_release, ensure_wheel
from installing import ROOT, clean_environment

from megatron_fp32_router.patching.chain import unwrap, wrapper_chain

OLDEST_WRAPT = "1.17.3"

#: A training step of a real Megatron with the plugin, and then everything as it was.
PROGRAM = """
import sys
import wrapt
from megatron_fp32_router import disable, enable, lab, status
from megatron_fp32_router.patching.records import PATCHES

lab.prepare(sys.argv[1])
recipe = lab.Recipe()

def step():
    with lab.parallel(recipe):
        room = lab.build(recipe)
        room.step(lab.text_batches(recipe, 1))
        return str(room.routers()[0][1].weight.dtype)

def now():
    there = [patch for patch in PATCHES if patch.module in sys.modules]
    found = {}
    for patch in there:
        try:
            found[patch.id] = wrapt.resolve_path(sys.modules[patch.module], patch.path)[2]
        except AttributeError:
            pass  # this release has no such function
    return found

disable()
off, before = step(), now()
enable()
on, between = step(), now()
applied = [record.id for record in status() if record.state == "applied"]
disable()
after = now()
assert all(after[name] is function for name, function in before.items())
assert all(between[name] is not before[name] for name in applied if name in before), applied
assert [hook for hook in sys.modules if hook.startswith("pkg_resources")] == []
print(wrapt.__version__, off, on, len(applied))
"""


def test_the_oldest_wrapt_is_enough_and_brings_no_setuptools() -> None:
    wheel = ensure_wheel("wrapt", OLDEST_WRAPT, holds="wrapt", folder=f"packages/wrapt-{OLDEST_WRAPT}")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(ensure_release(NEWEST))],
        cwd=ROOT,
        env=clean_environment(wheel, ROOT, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    version, off, on, applied = done.stdout.split()
    assert (version, off, on) == (OLDEST_WRAPT, "torch.bfloat16", "torch.float32")
    assert int(applied) > 5


def test_it_is_the_oldest_that_is_allowed() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (lowest,) = re.findall(r'"wrapt>=([\d.]+),', text)
    assert OLDEST_WRAPT.startswith(f"{lowest}.")


def _wrapped(original: Any) -> Any:
    @functools.wraps(original)
    def ours(*args: Any) -> Any:
        return original(*args)

    return ours


class _Base:
    def inherited(self) -> None: ...

    def own(self) -> None: ...


class _Class(_Base):
    def own(self) -> None: ...

    @staticmethod
    def static() -> None: ...


@pytest.mark.parametrize("path", ["_Class.own", "_Class.inherited", "_Class.static", "_function"])
def test_a_patch_that_is_taken_off_leaves_no_trace(path: str) -> None:
    module = ModuleType("module")
    module._Class, module._function = type("_Class", (_Base,), dict(vars(_Class))), lambda: None  # type: ignore[attr-defined]
    owner = module._Class if path.startswith("_Class") else module
    before = dict(vars(owner))
    wrap: Any = wrapt.wrap_object
    one, two = wrap(module, path, _wrapped), wrap(module, path, _wrapped)
    assert [entry for entry in wrapper_chain(two) if entry in (one, two)] == [two, one]
    with pytest.raises(ValueError, match="expected"):
        unwrap(module, path, one)  # the other one lies on it
    unwrap(module, path, two)
    unwrap(module, path, one)
    assert dict(vars(owner)) == before
    assert all(value is before[name] for name, value in vars(owner).items())


def test_a_chain_that_ends_in_itself_ends() -> None:
    def function() -> None: ...

    function.__wrapped__ = function  # type: ignore[attr-defined]
    assert list(wrapper_chain(function)) == [function]
