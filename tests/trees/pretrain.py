"""Runs a checkout's pretrain_gpt.py on a CPU, unmodified, and works out what its routers' biases ought to be."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from installing import ROOT, Environment, clean_environment

PROGRAMS = ROOT / "tests" / "programs"

STEPS, MICRO_BATCHES, EXPERTS, RATE = 4, 2, 8, 1e-3
_MICRO_BATCH = 16

ARGUMENTS = (
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 64 --num-attention-heads 4 --seq-length 64"
    " --max-position-embeddings 64 --position-embedding-type rope --no-rope-fusion --disable-bias-linear --swiglu"
    f" --untie-embeddings-and-output-weights --num-experts {EXPERTS} --moe-router-topk 2 --moe-ffn-hidden-size 64"
    f" --moe-router-enable-expert-bias --moe-router-score-function sigmoid --moe-router-bias-update-rate {RATE}"
    " --moe-router-load-balancing-type none --moe-token-dispatcher-type alltoall --transformer-impl local"
    " --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion"
    " --no-bias-gelu-fusion --no-bias-dropout-fusion --attention-softmax-in-fp32 --bf16 --mock-data"
    # The mock data of older releases has tokens up to 4,095.
    " --tokenizer-type NullTokenizer --vocab-size 4095 --split 100,0,0 --num-workers 0 --distributed-backend gloo"
    " --no-create-attention-mask-in-dataloader --eval-iters 0 --eval-interval 1000 --log-interval 1 --lr 1e-3"
    f" --micro-batch-size {_MICRO_BATCH} --train-iters {STEPS}"
    # Dropout draws from CUDA's generators, which a CPU does not have.
    " --attention-dropout 0 --hidden-dropout 0"
    f" --save-interval {STEPS // 2} --tensorboard-log-interval 1"
).split()

#: Experts apart, and a distributed optimizer.
TWO_RANKS = ("--expert-model-parallel-size", "2", "--use-distributed-optimizer")


def router_dtype(tree: Path, dtype: str) -> tuple[str, ...]:
    """Megatron's flag for the dtype of router scores; 0.11 has none."""
    config = tree / "megatron" / "core" / "transformer" / "transformer_config.py"
    return ("--moe-router-dtype", dtype) if "moe_router_dtype" in config.read_text(encoding="utf-8") else ()


@dataclass(frozen=True)
class Run:
    """What a training printed, and what observer.py saw in each rank."""

    folder: Path
    output: str
    ranks: list[dict[str, Any]]
    steps_taken: int

    def saved(self, step: int) -> Path:
        """The checkpoint after that step."""
        return self.folder / "saved" / f"iter_{step:07d}"

    @property
    def said(self) -> list[str]:
        """The plugin's lines in the log."""
        return [line for line in self.output.splitlines() if "megatron_fp32_router" in line]

    def dtypes(self, name: str) -> set[str]:
        """Those that a tensor has in all the routers of all the ranks."""
        return {dtypes[name].removeprefix("torch.") for rank in self.ranks for dtypes in rank["dtypes"]}

    def scores(self) -> set[str]:
        """The dtypes of what the routers hand to the dispatcher."""
        return {look["scores"].removeprefix("torch.") for rank in self.ranks for look in rank["looks"]}

    def steps(self, router: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each step: rank 0's bias, its counter at the end of the step, and what it ought to have counted."""
        looks = [[look for look in rank["looks"] if look["router"] == router] for rank in self.ranks]
        assert {len(each) for each in looks} == {self.steps_taken * MICRO_BATCHES}
        first = looks[0]
        return [
            (
                np.array(first[start]["bias"]),
                np.array(first[start + MICRO_BATCHES - 1]["counter"]),
                np.sum([look["chosen"] for look in first[start : start + MICRO_BATCHES]], axis=0),
            )
            for start in range(0, self.steps_taken * MICRO_BATCHES, MICRO_BATCHES)
        ]

    def biases(self, router: int) -> list[list[float]]:
        """A router's bias before each step and after the last one."""
        return [*(bias.tolist() for bias, _, _ in self.steps(router)), self.ranks[0]["bias"][router]]

    def exact_biases(self, router: int) -> list[list[float]]:
        """The same, from the first bias and the tokens that every rank's experts were given, by integers and fp32."""
        looks = [[look for look in rank["looks"] if look["router"] == router] for rank in self.ranks]
        exact = [np.array(looks[0][0]["bias"], dtype=np.float32)]
        for start in range(0, self.steps_taken * MICRO_BATCHES, MICRO_BATCHES):
            chosen = [look["chosen"] for each in looks for look in each[start : start + MICRO_BATCHES]]
            counts = np.sum(chosen, axis=0, dtype=np.int64)
            step = np.sign(counts.sum() - EXPERTS * counts).astype(np.float32) * np.float32(RATE)
            exact.append(exact[-1] + step)
        return [bias.tolist() for bias in exact]


def trained(run: Run) -> None:
    """The training was the whole program's, not the laboratory's."""
    assert all(rank["training"] for rank in run.ranks)


def protected(run: Run) -> None:
    """Every router of every rank is fp32, every bias is what integers make of the tokens, and status says no other."""
    assert run.dtypes("weight") == run.dtypes("expert_bias") == {"float32"}
    assert run.dtypes("local_tokens_per_expert") <= {"float64", "int64"}
    for router in (0, 1):
        assert run.biases(router) == run.exact_biases(router)
        assert len({tuple(bias) for bias in run.biases(router)}) == run.steps_taken + 1
    for rank in run.ranks:
        assert "site-packages" in rank["plugin"]
        assert not {"drifted", "displaced", "off"} & set(rank["status"].values())
        assert {rank["status"][name] for name in ("router-casts", "gating", "bias-update")} == {"applied"}


@dataclass(frozen=True)
class Program:
    """A checkout's pretrain_gpt.py, and the environment that it is started in."""

    tree: Path
    environment: Environment
    folder: Path

    def __call__(
        self, name: str, *arguments: str, plugin: bool = True, ranks: int = 1, load: Path | None = None, **more: str
    ) -> Run:
        """Train to step STEPS under torch.distributed.run, in a program that knows of the plugin by variables only.

        It leaves TensorBoard's file and checkpoints after half of the steps and after the last one below `name`.

        Args:
            load: the folder of the checkpoint after half of the steps to go on from.
            more: variables of its environment.
        """
        done = self.start(name, *arguments, plugin=plugin, ranks=ranks, load=load, **more)
        assert done.returncode == 0, done.stdout
        # 0.11 exits with 0 too where it cannot load.
        assert f"iteration {STEPS:8d}/ {STEPS:7d}" in done.stdout, done.stdout
        home = self.folder / name
        seen = [json.loads((home / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]
        return Run(home, done.stdout, seen, STEPS // 2 if load else STEPS)

    def start(
        self, name: str, *arguments: str, plugin: bool, ranks: int, load: Path | None, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """The same, whether it goes well or not."""
        home = self.folder / name
        # Megatron has `make` compile what cpu_program.py stands in for.
        make = home / "bin" / "make"
        make.parent.mkdir(parents=True)
        make.write_text("#!/bin/sh\n", encoding="utf-8")
        make.chmod(0o755)
        command = [self.environment.python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [self.tree / "pretrain_gpt.py", *ARGUMENTS, *arguments]
        command += ["--global-batch-size", str(_MICRO_BATCH * MICRO_BATCHES * ranks)]
        command += ["--tensorboard-dir", home / "tensorboard", "--save", home / "saved"]
        if load:
            command += ["--load", alone(load, home / "loaded")]
        variables = {
            "PATH": os.pathsep.join((str(make.parent), os.environ["PATH"])),
            "LAB": str(ROOT / "megatron_fp32_router" / "lab"),
            "PRETENCE": "cpu_program",
            "OBSERVE": str(home),
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            # 0.11 leaves it to torch, which was trusting then, how its legacy files are read.
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
            **({"MEGATRON_FP32_ROUTER": "1"} if plugin else {}),
            **more,
        }
        return subprocess.run(
            list(map(str, command)),
            env=clean_environment(self.tree, PROGRAMS / "pretence", **variables),
            cwd=home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )


def alone(checkpoint: Path, folder: Path) -> Path:
    """A folder for --load that holds this one checkpoint, as after a job that was killed before it wrote another."""
    folder.mkdir()
    (folder / checkpoint.name).symlink_to(checkpoint)
    number = int(checkpoint.name.removeprefix("iter_"))
    (folder / "latest_checkpointed_iteration.txt").write_text(str(number), encoding="utf-8")
    return folder
