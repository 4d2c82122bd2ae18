"""The command line: one function for each command; see the help of each."""

from __future__ import annotations

import argparse
import io
import os
import runpy
import sys
from collections.abc import Callable, Sequence

from megatron_fp32_router.audit import command as audit_command
from megatron_fp32_router.compat import check as compat_check
from megatron_fp32_router.compat import doctor as compat_doctor
from megatron_fp32_router.monitor import report as monitor_report
from megatron_fp32_router.version import __version__


def _run(arguments: argparse.Namespace) -> int:
    """Run a script or module as __main__; importing this package has armed the plugin already."""
    if not arguments.program:
        print("megatron-fp32-router run: expected a script, or -m and a module, to run", file=sys.stderr)
        return 2
    name, *rest = arguments.program
    if arguments.module:
        sys.argv = [name, *rest]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        return 0
    if not os.path.exists(name):
        print(f"megatron-fp32-router run: no such file: {name}", file=sys.stderr)
        return 2
    sys.argv = [name, *rest]
    # What python itself does for a script.
    sys.path.insert(0, os.path.dirname(os.path.abspath(name)))
    runpy.run_path(name, run_name="__main__")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from megatron_fp32_router.lab import demo

    code: int = demo.main(arguments)
    return code


def _audit(arguments: argparse.Namespace) -> int:
    return audit_command.main(arguments)


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


def _report(arguments: argparse.Namespace) -> int:
    return monitor_report.main(arguments)


def _check(arguments: argparse.Namespace) -> int:
    return compat_check.main(arguments)


def _doctor(arguments: argparse.Namespace) -> int:
    return compat_doctor.main(arguments)


def _parser(with_demo: bool, with_serving: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-fp32-router",
        description="Keeps everything that Megatron-LM's mixture-of-experts router decides with in fp32.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run a training script under the plugin")
    run.add_argument("-m", dest="module", action="store_true", help="run a module instead of a script")
    run.add_argument("program", nargs=argparse.REMAINDER, help="the script or module, and its own arguments")
    run.set_defaults(action=_run)
    audit = commands.add_parser("audit", help="say what a checkpoint on disk tells about its routers")
    audit.set_defaults(action=_audit)
    audit_command.add_arguments(audit)
    patch = commands.add_parser(
        "patch",
        help="write the plugin's changes into the source of a Megatron checkout",
        epilog="Exit codes: 0 done, 1 the tree has changes of its own (or, with --check, is not as wanted), "
        "2 not a tree that the patches were made for.",
    )
    patch.add_argument("--megatron", required=True, metavar="PATH", help="the folder that holds megatron/")
    patch.add_argument("--reverse", action="store_true", help="take the patches back")
    patch.add_argument("--check", action="store_true", help="change nothing; say whether the tree is patched")
    patch.set_defaults(action=_patch)
    report = commands.add_parser("report", help="turn the monitor's file into a page")
    report.set_defaults(action=_report)
    monitor_report.add_arguments(report)
    check = commands.add_parser("check", help="is the plugin right for a Megatron? exit codes: 0 yes, 1 no, 2 unknown")
    check.set_defaults(action=_check)
    compat_check.add_arguments(check)
    doctor = commands.add_parser("doctor", help="everything about this environment on one screen; exit codes as check")
    doctor.set_defaults(action=_doctor)
    compat_doctor.add_arguments(doctor)
    demo = commands.add_parser("demo", help="train a tiny MoE with the plugin off and on, and compare")
    demo.set_defaults(action=_demo)
    if with_demo:
        # Its options live in the laboratory, which a training job never loads.
        from megatron_fp32_router.lab import demo as laboratory_demo

        laboratory_demo.add_arguments(demo)
    predict = commands.add_parser(
        "predict",
        help="say what share of balance updates a run without the plugin gets wrong; exit codes: 0 none, 1 some",
    )
    predict.set_defaults(action=_predict)
    parity = commands.add_parser(
        "parity",
        help="say how many recorded tokens an engine sends to other experts; exit codes: 0 none, 1 some",
    )
    parity.set_defaults(action=_parity)
    if with_serving:
        # Nor what is about serving.
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
        return _run(arguments)  # its streams are the user's program's
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A log in ASCII gets "?" for a table's lines, not a traceback.
            stream.reconfigure(errors="replace")
    try:
        code = action(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read this, `head` say, has enough; what is still to be written goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    return code
