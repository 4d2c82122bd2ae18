"""Activation in every order: what counts is that the patches are in place, asked live, when Megatron has been imported.

Every case is a new interpreter with an unmodified Megatron on its path.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from bootstrap import RELEASES, ensure_release

ROOT = Path(__file__).resolve().parent.parent
RELEASE = "0.16.1"

IMPORTS = """
import megatron.core.optimizer.distrib_optimizer
import megatron.core.transformer.module
import megatron.core.transformer.moe.router
import megatron.core.distributed.finalize_model_grads
"""

# Of the modules that are imported by then: some exist in a few releases only, one in no wheel.
VERDICT = """
import sys
import megatron_fp32_router
from megatron_fp32_router.patching.records import PATCHES
here = {patch.id for patch in PATCHES if patch.module in sys.modules}
states = {record.id: record.state for record in megatron_fp32_router.status() if record.id in here}
print(sorted(name for name, state in states.items() if state not in ("applied", "native")), "gating" in states)
"""


def run(
    program: str, tmp_path: Path, *arguments: str, release: str = RELEASE, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `program` as a script; `arguments` come before its name."""
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(program), encoding="utf-8")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MEGATRON_FP32_ROUTER")}
    path = os.pathsep.join([str(ensure_release(release)), str(ROOT), str(tmp_path)])
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments, str(script)],
        env={**inherited, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


ORDERS = {
    "plugin before Megatron": "import megatron_fp32_router" + IMPORTS,
    "Megatron before plugin": IMPORTS,
    "twice": "import megatron_fp32_router" + IMPORTS + "megatron_fp32_router.enable(); megatron_fp32_router.enable()",
    "after a reload of the plugin": "import importlib, megatron_fp32_router"
    + IMPORTS
    + "importlib.reload(megatron_fp32_router)",
    "after disable() before Megatron was imported": "import megatron_fp32_router\nmegatron_fp32_router.disable()"
    + IMPORTS
    + "megatron_fp32_router.enable()",
    "after Megatron was deleted and imported again": "import sys, megatron_fp32_router"
    + IMPORTS
    + "for name in [n for n in sys.modules if n == 'megatron' or n.startswith('megatron.')]: del sys.modules[name]\n"
    + IMPORTS,
}


#: The oldest release has other modules. (The newest cannot be imported on a CPU without the laboratory.)
CASES = [(order, RELEASE) for order in ORDERS] + [(order, RELEASES[0]) for order in list(ORDERS)[:2]]


@pytest.mark.parametrize(("order", "release"), CASES)
def test_the_patches_are_in_place(order: str, release: str, tmp_path: Path) -> None:
    done = run(ORDERS[order] + VERDICT, tmp_path, release=release)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[] True"


def test_a_half_imported_module_is_patched_when_its_import_has_ended(tmp_path: Path) -> None:
    # moe_utils is imported by router.py before it defines its classes: that is the moment at which this arms.
    program = """
    import importlib.abc, sys

    class Early(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name == "megatron.core.transformer.moe.moe_utils" and "megatron_fp32_router" not in sys.modules:
                assert "megatron.core.transformer.moe.router" in sys.modules
                import megatron_fp32_router
                print(next(r.detail for r in megatron_fp32_router.status() if r.id == "gating"))

    sys.meta_path.insert(0, Early())
    import megatron.core.transformer.moe.router
    """
    done = run(textwrap.dedent(program) + IMPORTS + VERDICT, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["the module is half imported", "[] True"]


def test_a_module_whose_import_fails_halfway_is_patched_when_it_is_imported_again(tmp_path: Path) -> None:
    program = """
    import importlib.abc, sys

    class Interrupting(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name == "megatron.core.transformer.moe.moe_utils" and "megatron_fp32_router" not in sys.modules:
                assert "megatron.core.transformer.moe.router" in sys.modules
                import megatron_fp32_router
                raise ImportError("interrupted")

    sys.meta_path.insert(0, Interrupting())
    try:
        import megatron.core.transformer.moe.router
    except ImportError as error:
        print(error)
    """
    done = run(textwrap.dedent(program) + IMPORTS + VERDICT, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["interrupted", "[] True"]


def test_children_are_patched_too(tmp_path: Path) -> None:
    program = """
    import multiprocessing
    import megatron_fp32_router

    def child():
        import megatron.core.transformer.moe.router
        print({r.id: r.state for r in megatron_fp32_router.status()}["gating"], flush=True)

    if __name__ == "__main__":
        for method in ("fork", "spawn"):
            process = multiprocessing.get_context(method).Process(target=child)
            process.start()
            process.join()
        import megatron.core.transformer.moe.router
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join()
    """
    done = run(program, tmp_path)
    assert done.stdout.split() == ["applied"] * 3, done.stderr


def test_run_arms_before_the_script_and_the_kill_switch_wins(tmp_path: Path) -> None:
    program = IMPORTS + "import sys\nprint(__name__, sys.argv[1:])\n" + VERDICT
    done = run(program, tmp_path, "-m", "megatron_fp32_router", "run")
    assert done.stdout.splitlines() == ["__main__ []", "[] True"], done.stderr
    off = run(
        "import megatron_fp32_router\nmegatron_fp32_router.enable()\n"
        + IMPORTS
        + "print({record.state for record in megatron_fp32_router.status()})",
        tmp_path,
        MEGATRON_FP32_ROUTER="0",
    )
    assert off.stdout.strip() == "{'off'}"
    assert off.stderr.count("MEGATRON_FP32_ROUTER=0") == 1


def test_bad_values_are_errors_that_list_the_accepted_ones_and_misspelt_names_are_warned_about(tmp_path: Path) -> None:
    bad = run("import megatron_fp32_router", tmp_path, MEGATRON_FP32_ROUTER_PROTECT="weights")
    assert bad.returncode != 0
    assert "accepted are 'all', 'buffers'" in bad.stderr
    misspelt = run("import megatron_fp32_router", tmp_path, MEGATRON_FP32_ROUTER_PROTEKT="all")
    assert misspelt.returncode == 0
    assert "did you mean MEGATRON_FP32_ROUTER_PROTECT?" in misspelt.stderr


def test_arming_imports_neither_torch_nor_megatron(tmp_path: Path) -> None:
    done = run(
        "import sys, megatron_fp32_router\nprint([n for n in ('torch', 'megatron', 'numpy') if n in sys.modules])",
        tmp_path,
    )
    assert done.stdout.strip() == "[]"
