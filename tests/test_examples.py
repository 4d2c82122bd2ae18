"""The launch recipes under examples/ are run: a real training, which knows nothing of the plugin, is protected."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml
from bootstrap import NEWEST, ensure_release
from installing import ROOT, Environment, build_wheel, clean_environment

EXAMPLES = ROOT / "examples"
PROGRAMS = ROOT / "tests" / "programs"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def _free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def _environment(python: Path | str, **variables: str) -> dict[str, str]:
    """What a shell on a training node has, without the plugin's variable: the recipe is to set it."""
    return clean_environment(
        ensure_release(NEWEST),
        PROGRAMS / "pretence",  # the CPU passes for CUDA; it does not import the plugin
        PYTHON=str(python),
        LAB=str(ROOT / "megatron_fp32_router" / "lab"),
        CUDA_VISIBLE_DEVICES="",
        OMP_NUM_THREADS="1",
        **variables,
    )


def _run(command: list[Path | str], environment: dict[str, str], folder: Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(list(map(str, command)), env=environment, cwd=folder, stdout=pipe, stderr=pipe, text=True)


def _trained(*started: subprocess.Popen[str], ranks: int) -> str:
    """Wait for all, demand that every rank's router is fp32 and its bias exact, and return what was said."""
    try:
        said = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    out, err = ("\n".join(parts) for parts in zip(*said, strict=True))
    assert [process.returncode for process in started] == [0] * len(started), err
    found = [json.loads(line[line.index("{") :]) for line in out.splitlines() if "rank " in line and "{" in line]
    assert len(found) == ranks, out + err
    for rank in found:
        assert rank["dtypes"]["weight"] == rank["dtypes"]["expert_bias"] == "torch.float32"
        assert rank["bias"] == rank["exact"] != [0.75] * 8
    return out + err


def _files(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*") if "__pycache__" not in path.parts}


def test_torchrun_on_two_nodes(wheel: Path, tmp_path: Path) -> None:
    made = Environment.make(tmp_path / "env")
    made.install(wheel)
    made.borrow()
    nodes = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "GPUS_PER_NODE": "1"}
    environment = _environment(made.python, **nodes)
    command = [EXAMPLES / "torchrun" / "launch.sh", PROGRAMS / "train.py"]
    said = _trained(*(_run(command, environment | {"NODE_RANK": node}, tmp_path) for node in "01"), ranks=2)
    assert "all 2 ranks on 1 host agree" in said


#: Stands in for Slurm: starts the tasks of a step, one a node, as srun does, and leaves the container out.
_SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
SLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@" && wait $!
"""


def test_slurm_with_an_image_whose_site_packages_are_not_written_to(wheel: Path, tmp_path: Path) -> None:
    made = Environment.make(tmp_path / "image")
    made.borrow()
    before = _files(made.site)
    plugin, tools = tmp_path / "plugin", tmp_path / "tools"
    tools.mkdir()
    for name, text in (("srun", _SRUN), ("scontrol", "#!/bin/sh\necho 127.0.0.1; echo other\n")):
        (tools / name).write_text(text, encoding="utf-8")
        (tools / name).chmod(0o755)
    environment = _environment(
        made.python,
        PATH=f"{tools}:{os.environ['PATH']}",
        IMAGE="image",
        PLUGIN=str(plugin),
        SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_JOB_NODELIST="node[0-1]",
        SLURM_NNODES="2",
        GPUS_PER_NODE="1",
        MASTER_PORT=_free_port(),
        # Nothing is fetched: what the plugin needs is borrowed.
        PIP_NO_DEPS="1",
        PIP_NO_INDEX="1",
    )
    command = [EXAMPLES / "read-only" / "target.sh", plugin, wheel]
    assert subprocess.run(command, env=environment, cwd=tmp_path, check=False).returncode == 0
    command = [EXAMPLES / "slurm" / "train.sbatch", PROGRAMS / "train.py"]
    said = _trained(_run(command, environment, tmp_path), ranks=2)
    assert "all 2 ranks on 1 host agree" in said
    assert _files(made.site) == before


def test_an_environment_on_top_of_one_that_is_not_written_to(wheel: Path, tmp_path: Path) -> None:
    # What the image has is on PYTHONPATH here: the Python that makes the environment is itself in one.
    environment = _environment(sys.executable, PIP_NO_DEPS="1", PIP_NO_INDEX="1", PIP_IGNORE_INSTALLED="1")
    command = [EXAMPLES / "read-only" / "venv.sh", tmp_path / "env", wheel]
    made = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    environment["PYTHONPATH"] += os.pathsep + sysconfig.get_path("purelib")
    environment["MEGATRON_FP32_ROUTER"] = "1"
    command = [made.stdout.strip(), "-m", "torch.distributed.run", "--standalone", PROGRAMS / "train.py"]
    said = _trained(_run(command, environment, tmp_path), ranks=1)
    assert "2 routers: " in said


#: Where it is not installed there is no such test, and `scripts/test` says so: what is skipped counts as not run.
HAS_RAY = importlib.util.find_spec("ray") is not None


def _ray_with_a_runtime_env(wheel: Path, tmp_path: Path) -> None:
    made = Environment.make(tmp_path / "env")
    made.install(wheel)
    made.borrow()
    # An actor learns its rank after it has started, so the pretence waits for the program.
    program = tmp_path / "train.py"
    program.write_text(
        "import runpy, sitecustomize\n"
        "sitecustomize.pretend()\n"
        f"runpy.run_path({str(PROGRAMS / 'train.py')!r}, run_name='__main__')\n",
        encoding="utf-8",
    )
    # A home of its own: Ray writes a token there.
    environment = _environment(made.python, HOME=str(tmp_path), RAY_USAGE_STATS_ENABLED="0")
    command = [made.python, EXAMPLES / "ray" / "train.py", "--ranks", "2", "--gpus-per-rank", "0", program]
    said = _trained(_run(command, environment, tmp_path), ranks=2)
    assert "all 2 ranks on 1 host agree" in said


if HAS_RAY:
    test_ray_with_a_runtime_env = _ray_with_a_runtime_env


def test_the_kubernetes_job_sets_the_variable_in_every_pod() -> None:
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes" / "job.yaml").read_text(encoding="utf-8"))
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {"name": "MEGATRON_FP32_ROUTER", "value": "1"} in container["env"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert f"--nnodes={job['spec']['completions']}" in container["args"]
    assert f"--master-addr={job['metadata']['name']}-0.{pod['subdomain']}" in container["args"]
