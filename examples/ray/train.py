"""Ray, protected: one actor for each rank, all with the plugin's variable in their runtime_env.

    python examples/ray/train.py --ranks 16 --gpus-per-rank 1 pretrain_gpt.py ARGUMENTS…

An actor is a process that Ray starts. It does not inherit the environment of the driver's shell, nor what the driver
has imported or patched; it has what runtime_env says. The plugin is installed in the image that the actors run in.
"""

from __future__ import annotations

import argparse
import os
import runpy
import socket
import sys
from typing import Any

import ray

#: Values must be strings: Ray refuses the number 1.
RUNTIME_ENV = {"env_vars": {"MEGATRON_FP32_ROUTER": "1"}}


@ray.remote
class Rank:
    """One rank of the training."""

    def meeting_point(self) -> tuple[str, int]:
        """A host and a free port of this actor's node, where all ranks meet."""
        with socket.socket() as found:
            found.bind(("", 0))
            return ray.util.get_node_ip_address(), found.getsockname()[1]

    def train(self, rank: int, world: int, meeting_point: tuple[str, int], folder: str, command: list[str]) -> None:
        """Run the program in the driver's folder as torchrun would."""
        os.chdir(folder)
        host, port = meeting_point
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
        sys.argv = command
        sys.path.insert(0, os.path.dirname(os.path.abspath(command[0])))
        runpy.run_path(command[0], run_name="__main__")


def main() -> None:
    """Start the actors, train, and wait for all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--gpus-per-rank", type=float, default=1)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the training script and its arguments")
    arguments = parser.parse_args()
    ray.init()
    # For the actors, not for ray.init: a variable that a submitted job has set already may be repeated here only.
    options: dict[str, Any] = {"num_gpus": arguments.gpus_per_rank, "num_cpus": 1, "runtime_env": RUNTIME_ENV}
    actors = [Rank.options(**options).remote() for _ in range(arguments.ranks)]
    alike = len(actors), ray.get(actors[0].meeting_point.remote()), os.getcwd(), arguments.command
    ray.get([actor.train.remote(rank, *alike) for rank, actor in enumerate(actors)])


if __name__ == "__main__":
    main()
