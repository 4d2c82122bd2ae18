"""Runs a checkout's pretrain_gpt.py on a CPU, unmodified, and works out what its routers' biases ought to be."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from installing import ROOT, Environment, clean_environment

PROGRAMS = ROOT / "tests" / "programs"

STEPS, MICRO_BATCHES, EXPERTS, RATE = 5, 2, 8, 1e-3
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
).split()


@dataclass(frozen=True)
class Run:
    """What a training printed, and what observer.py saw in each rank."""

    output: str
    ranks: list[dict[str, Any]]

    @property
    def said(self) -> list[str]:
        """The plugin's lines in the log."""
        return [line for line in self.output.splitlines() if "megatron_fp32_router" in line]

    def dtypes(self, name: str) -> set[str]:
        """Those that a tensor has in all the routers of all the ranks."""
        return {dtypes[name].removeprefix("torch.") for rank in self.ranks for dtypes in rank["dtypes"]}

    def steps(self, router: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each step: rank 0's bias, its counter at the end of the step, and what it ought to have counted."""
        looks = [[look for look in rank["looks"] if look["router"] == router] for rank in self.ranks]
        assert {len(each) for each in looks} == {STEPS * MICRO_BATCHES}
        first = looks[0]
        return [
            (
                np.array(first[start]["bias"]),
                np.array(first[start + MICRO_BATCHES - 1]["counter"]),
                np.sum([look["chosen"] for look in first[start : start + MICRO_BATCHES]], axis=0),
            )
            for start in range(0, STEPS * MICRO_BATCHES, MICRO_BATCHES)
        ]

    def biases(self, router: int) -> list[list[float]]:
        """A router's bias before each step and after the last one."""
        return [*(bias.tolist() for bias, _, _ in self.steps(router)), self.ranks[0]["bias"][router]]

    def exact_biases(self, router: int) -> list[list[float]]:
        """The same, from the first bias and the tokens that every rank's experts were given, by integers and fp32."""
        looks = [[look for look in rank["looks"] if look["router"] == router] for rank in self.ranks]
        exact = [np.array(looks[0][0]["bias"], dtype=np.float32)]
        for start in range(0, STEPS * MICRO_BATCHES, MICRO_BATCHES):
            chosen = [look["chosen"] for each in looks for look in each[start : start + MICRO_BATCHES]]
            counts = np.sum(chosen, axis=0, dtype=np.int64)
            step = np.sign(counts.sum() - EXPERTS * counts).astype(np.float32) * np.float32(RATE)
            exact.append(exact[-1] + step)
        return [bias.tolist() for bias in exact]


def run(tree: Path, environment: Environment, folder: Path, plugin: bool, ranks: int, arguments: Sequence[str]) -> Run:
    """Five steps under torch.distributed.run, in a program that knows nothing of the plugin but its variable."""
    # Megatron has `make` compile what cpu_program.py stands in for.
    make = folder / "bin" / "make"
    make.parent.mkdir()
    make.write_text("#!/bin/sh\n", encoding="utf-8")
    make.chmod(0o755)
    command = [environment.python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [tree / "pretrain_gpt.py", *ARGUMENTS, *arguments]
    command += ["--global-batch-size", str(_MICRO_BATCH * MICRO_BATCHES * ranks)]
    variables = {
        "PATH": os.pathsep.join((str(make.parent), os.environ["PATH"])),
        "LAB": str(ROOT / "megatron_fp32_router" / "lab"),
        "PRETENCE": "cpu_program",
        "OBSERVE": str(folder),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        list(map(str, command)),
        env=clean_environment(
            tree, PROGRAMS / "pretence", **variables, **({"MEGATRON_FP32_ROUTER": "1"} if plugin else {})
        ),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    seen = [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]
    return Run(done.stdout, seen)
