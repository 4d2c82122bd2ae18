"""The command line: one function for each command; see the help of each."""

from __future__ import annotations

import argparse
import io
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

from megatron_fp32_router.audit import command as audit_command
from megatron_fp32_router.compat import check as compat_check
from megatron_fp32_router.compat import doctor as compat_doctor
from megatron_fp32_router.monitor import report as monitor_report
from megatron_fp32_router.terminal import refuse
from megatron_fp32_router.version import __version__


def _run(arguments: argparse.Namespace) -> int:
    """Run a script or module as __main__; importing this package has armed the plugin already."""
    if not arguments.program:
        return refuse("run", "expected a script, or -m and a module, to run")
    name, *rest = arguments.program
    if arguments.module:
        sys.argv = [name, *rest]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        return 0
    if not os.path.exists(name):
        return refuse("run", f"no such file: {name}")
    sys.argv = [name, *rest]
    # What python itself does for a script.
    sys.path.insert(0, os.path.dirname(os.path.abspath(name)))
    runpy.run_path(name, run_name="__main__")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from megatron_fp32_router.lab import demo

    code: int = demo.main(arguments)
    return code


def _predict(arguments: argparse.Namespace) -> int:
    from megatron_fp32_router.serving import command

    return command.main(arguments)


def _parity(arguments: argparse.Namespace) -> int:
    from megatron_fp32_router.serving import parity_command

    return parity_command.main(arguments)


def _patch(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from megatron_fp32_router import source_patches

    return source_patches.main(Path(arguments.megatron), check=arguments.check, reverse=arguments.reverse)


#: What the help of each command says beside its first line.
_DESCRIPTIONS: Final = {
    "run": "For places where Python reads no .pth files: PYTHONPATH, pip install --target, python -S. The\n"
    "script runs as __main__. Under torchrun: torchrun ... -m megatron_fp32_router run SCRIPT ...",
    "audit": "Reads DCP, legacy and safetensors checkpoints; needs neither Megatron nor torch nor a GPU, and\n"
    "writes nothing unless asked to.",
    "patch": "For trees that cannot be patched while they run. All files are changed, or none. Needs git.",
    "report": "One HTML page that needs no network, from what MEGATRON_FP32_ROUTER_MONITOR has written.",
    "check": "Reads the source and imports neither torch nor Megatron; --probe also trains a tiny model on it.",
    "doctor": "The interpreter, the installation, the variables, the patches, and what stands in the way.\n"
    "With --device also how exact and how fast the router's products are on this GPU.",
    "demo": "Trains the real Megatron on a CPU or a GPU, on real text, and writes a page. Takes minutes.",
    "parity": "Runs recorded router inputs through the arithmetic of each engine, emulated on a CPU.",
    "predict": "Simulates a run's token counts as that release adds them up. Needs NumPy and ml_dtypes, no GPU.",
}


def _parser(with_demo: bool, with_serving: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-fp32-router",
        description="Keeps everything that Megatron-LM's mixture-of-experts router decides with in fp32.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, action: Callable[[argparse.Namespace], int], short: str, codes: str, example: str) -> Any:
        more = _DESCRIPTIONS[name]
        command = commands.add_parser(
            name,
            help=short,
            description=f"{short[0].upper()}{short[1:]}.\n\n{more}",
            epilog=f"exit codes:\n  {codes}\n\nexample:\n  megatron-fp32-router {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(action=action)
        return command

    run = add(
        "run",
        _run,
        "run a training script under the plugin",
        "those of the script; 2: there is no such script, or a variable has a value that is not accepted",
        "run pretrain_gpt.py --num-experts 64 ...",
    )
    run.add_argument("-m", dest="module", action="store_true", help="run a module instead of a script")
    run.add_argument("program", nargs=argparse.REMAINDER, help="the script or module, and its own arguments")
    audit = add(
        "audit",
        audit_command.main,
        "say what a checkpoint on disk tells about its routers",
        "0 good, 1 a problem was found, 2 could not tell or bad input",
        "audit checkpoints/iter_0010000 --against checkpoints/iter_0005000",
    )
    audit_command.add_arguments(audit)
    patch = add(
        "patch",
        _patch,
        "write the plugin's changes into the source of a Megatron checkout",
        "0 done, 1 the tree has changes of its own (or, with --check, is not as wanted),\n"
        "  2 not a tree that the patches were made for",
        "patch --megatron path/to/Megatron-LM --check",
    )
    patch.add_argument("--megatron", required=True, metavar="PATH", help="the folder that holds megatron/")
    patch.add_argument("--reverse", action="store_true", help="take the patches back")
    patch.add_argument("--check", action="store_true", help="change nothing; say whether the tree is patched")
    report = add(
        "report",
        monitor_report.main,
        "turn the monitor's file into a page",
        "0 written, 2 bad input, or the page could not be written",
        "report fp32_router_monitor",
    )
    monitor_report.add_arguments(report)
    check = add(
        "check",
        compat_check.main,
        "say whether the plugin is right for a Megatron",
        "0 it fits, 1 it does not, 2 could not tell or bad input",
        "check --megatron path/to/Megatron-LM",
    )
    compat_check.add_arguments(check)
    doctor = add(
        "doctor",
        compat_doctor.main,
        "say everything about this environment on one screen",
        "0 nothing stands in the way, 1 something does, 2 there is no Megatron to look at, or, with\n"
        "  --device, no GPU",
        "doctor --device --json",
    )
    compat_doctor.add_arguments(doctor)
    demo = add(
        "demo",
        _demo,
        "train a tiny MoE with the plugin off and on, and compare",
        "0 protected, 1 an update was wrong or a tensor below fp32 with the plugin on, or a run broke off,\n"
        "  2 bad input",
        "demo --megatron path/to/Megatron-LM",
    )
    if with_demo:
        # Its options are in the laboratory, which a training never imports.
        from megatron_fp32_router.lab import demo as laboratory_demo

        laboratory_demo.add_arguments(demo)
    predict = add(
        "predict",
        _predict,
        "say what share of balance updates a run without the plugin gets wrong",
        "0 none is wrong, 1 some are, 2 bad input",
        "predict --release 0.16.1 --experts 256 --ranks 512",
    )
    parity = add(
        "parity",
        _parity,
        "say how many recorded tokens an engine sends to other experts",
        "0 none, 1 some, 2 bad input",
        "parity fp32_router_monitor --for vllm==0.33.0 --config export/config.json",
    )
    if with_serving:
        # Theirs are in serving/, which the other commands do not need.
        from megatron_fp32_router.serving import command as serving_command
        from megatron_fp32_router.serving import parity_command

        serving_command.add_arguments(predict)
        parity_command.add_arguments(parity)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script. Returns the exit code."""
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser(given[:1] == ["demo"], given[:1] in (["predict"], ["parity"])).parse_args(given)
    action: Callable[[argparse.Namespace], int] = arguments.action
    if action is _run:
        return _run(arguments)  # the user's program decides about its own streams
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A log in ASCII gets "?" for a table's lines, not a traceback.
            stream.reconfigure(errors="replace")
    try:
        code = action(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, `head` for example, has closed the pipe: discard what is still to be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    return code
