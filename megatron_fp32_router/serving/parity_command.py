"""`megatron-fp32-router parity INPUTS --for ENGINE==VERSION --config CONFIG`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_fp32_router.errors import Fp32RouterError
from megatron_fp32_router.terminal import AUDIT, lacking, refuse

if TYPE_CHECKING:
    import argparse

    from megatron_fp32_router.serving.contracts import Engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `parity`."""
    parser.add_argument(
        "inputs", type=Path, metavar="INPUTS", help="a file that MONITOR_RECORD wrote, or the monitor's folder"
    )
    parser.add_argument(
        "--for",
        dest="engines",
        action="append",
        default=[],
        metavar="ENGINE==VERSION",
        help="route as this engine would; repeat it, or separate several by commas",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="the model's config.json, or a folder with one; --for needs it"
    )
    parser.add_argument("--json", action="store_true", help="everything, as JSON")


def main(arguments: argparse.Namespace) -> int:
    """Compare, print, and return the exit code: 0 no token is sent elsewhere, 1 some are, 2 bad input."""
    try:
        return _main(arguments)
    except ImportError as error:
        if error.name not in (*AUDIT, "torch"):
            raise
        return _refuse(lacking(error.name, *(("torch",) if error.name == "torch" else AUDIT)))
    except Fp32RouterError as error:
        return _refuse(str(error))


def _refuse(why: str) -> int:
    return refuse("parity", why)


def _main(arguments: argparse.Namespace) -> int:
    from megatron_fp32_router.monitor.recording import read
    from megatron_fp32_router.serving.contracts import find
    from megatron_fp32_router.serving.export import config_in
    from megatron_fp32_router.serving.parity import parity

    engines = [find(asked) for option in arguments.engines for asked in option.split(",")]
    if engines and arguments.config is None:
        return _refuse("--for needs --config FILE: the model's config.json says what the engine will make of it")
    config = None if arguments.config is None else config_in(arguments.config)
    step, inputs = read(arguments.inputs)
    layers = parity(inputs, engines, config)
    if arguments.json:
        print(json.dumps({"step": step, "layers": layers}, indent=2, allow_nan=False))
    else:
        print("\n".join(_lines(step, layers, engines, config or {})))
    return 1 if any(each["together"]["tokens"] for layer in layers for each in layer["engines"].values()) else 0


def _lines(step: int, layers: list[dict[str, Any]], engines: list[Engine], config: dict[str, Any]) -> list[str]:
    tokens = sum(layer["tokens"] for layer in layers)
    said = [f"step {step}: {tokens:,} tokens of {len(layers)} layers; tokens with another set of experts than training"]
    said += ["", "if only this were rounded (the monitor's flips)"]
    names = list(dict.fromkeys(name for layer in layers for name in layer["monitor"]))
    said += _table(["layer", *names], [[layer["layer"], *_shares(layer["monitor"], names)] for layer in layers])
    for engine in engines:
        asked = f"{engine.engine}=={engine.versions[0]}"
        found = [(layer, layer["engines"][asked]) for layer in layers]
        parts = list(dict.fromkeys(part for _, each in found for part in each["alone"]))
        rows = [
            [
                layer["layer"],
                f"{each['together']['tokens'] / layer['tokens']:.2%}",
                f"{each['together']['experts']:,}",
                f"{each['together']['weight_same_experts']:.2g}",
                *_shares({part: alone["tokens"] / layer["tokens"] for part, alone in each["alone"].items()}, parts),
            ]
            for layer, each in found
        ]
        has = ", ".join(f"{part} {dtype}" for part, dtype in found[0][1]["arithmetic"].items())
        said += ["", f"{engine.name} {engine.versions[0]}, {config['architectures'][0]}: {has}"]
        said += _table(["layer", "tokens", "experts changed", "weight off by", *(f"{p} alone" for p in parts)], rows)
        said += _switches(engine, config, {part for _, each in found for part in each["alone"]})
    if engines:
        said += ["", "emulated on a CPU: an engine's kernels add up in another order, and scores are taken to be fp32"]
    return said


def _shares(values: dict[str, float], names: list[str]) -> list[str]:
    return [f"{values[name]:.2%}" if name in values else "" for name in names]


def _switches(engine: Engine, config: dict[str, Any], parts: set[str]) -> list[str]:
    model = engine.model(config["architectures"][0])
    entries = [(part, model.usual(part, config)) for part in ("weight", "bias", "expert_bias", "logits")]
    return [
        f"{part}: {entry.source}; {entry.switch or 'no switch is known'}"
        for part, entry in entries
        if entry is not None and part in parts
    ]


def _table(header: list[str], rows: list[list[Any]]) -> list[str]:
    cells = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
