"""`megatron-fp32-router predict`: is a run affected? Answered without its checkpoint."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from megatron_fp32_router.errors import Fp32RouterError
from megatron_fp32_router.terminal import AUDIT, lacking, refuse

if TYPE_CHECKING:
    import argparse

_LOW = {"bf16": "bfloat16", "fp16": "float16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `predict`."""
    parser.add_argument("--release", default="0.19.2", help="megatron-core, 0.11 to 0.19 (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--topk", type=int, default=8, help="experts of each token (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1 << 22, help="of one step, all ranks (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=64, help="TP x CP x DP, whose counts are added up (default: 64)")
    parser.add_argument("--micro-batches", type=int, default=1, help="of one rank and step (default: 1)")
    parser.add_argument("--layers", type=int, default=58, help="with a router (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1e-3, help="moe_router_bias_update_rate (default: 1e-3)")
    parser.add_argument("--bias", type=float, default=0.0, help="of every expert at the start (default: 0)")
    parser.add_argument("--precision", choices=tuple(_LOW), default="bf16", help="of the model (default: bf16)")
    parser.add_argument(
        "--spread",
        type=float,
        action="append",
        help="how much the experts' loads differ: one standard deviation, as a share of the mean; repeat it "
        "(default: 0.01, 0.05, 0.2)",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")


def main(arguments: argparse.Namespace) -> int:
    """Simulate, print, and return the exit code: 0 no update is wrong, 1 some are, 2 bad input."""
    try:
        from megatron_fp32_router.serving.predict import Run, predict

        names = ("release", "experts", "topk", "tokens", "ranks", "micro_batches", "layers", "rate", "bias", "seed")
        run = Run(precision=_LOW[arguments.precision], **{name: getattr(arguments, name) for name in names})
        found = predict(run, arguments.spread or (0.01, 0.05, 0.2))
    except ImportError as error:
        if error.name not in AUDIT:
            raise
        return refuse("predict", lacking(error.name, "numpy", "ml_dtypes"))
    except Fp32RouterError as error:
        return refuse("predict", str(error))
    print(json.dumps(found, indent=2) if arguments.json else "\n".join(_lines(found)))
    return 1 if any(share["wrong"] for share in found["shares"]) else 0


def _lines(found: dict[str, Any]) -> list[str]:
    run = found["run"]
    said = [
        f"Megatron {run['release']} without this plugin, {run['precision']}; expert_bias is {found['bias_dtype']}",
        f"{found['updates_per_step']:,} updates a step: {run['layers']} layers x {run['experts']} experts",
        f"a count is about {found['mean_count']:,.0f}, where neighbouring {run['precision']} numbers are "
        f"{found['spacing_of_counts']:,g} apart ({found['spacing_of_counts'] / found['mean_count']:.2%})",
    ]
    if found["overflows"]:
        said.append("the sum of all counts is above float16's 65,504, and infinite: nothing is balanced any more")
    said.append("")
    said.append("loads differ by   wrong updates: not made   wrong way   without need   wrong size")
    said += [
        f"{share['spread']:13.1%}   {share['wrong']:13.1%}  {share['not_made']:8.1%}   {share['wrong_way']:9.1%}   "
        f"{share['needless']:12.1%}   {share['wrong_size']:10.1%}"
        for share in found["shares"]
    ]
    said.append("")
    said.append(
        f"from a bias of {found['swallowed_from']:,g} on, an update of {run['rate']:g} away from zero changes nothing: "
        f"after {found['swallowed_after_steps']:,} steps at the earliest"
    )
    said.append(
        f"simulated: {found['shares'][0]['updates']:,} updates for each line, seed {run['seed']}; counts are added up "
        f"rank after rank in {run['precision']}, from biases of {run['bias']:g}"
    )
    return said
