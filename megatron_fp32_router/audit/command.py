"""`megatron-fp32-router audit PATH …`"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from megatron_fp32_router.audit.files import SEARCH_LIMIT
from megatron_fp32_router.errors import Fp32RouterError
from megatron_fp32_router.terminal import AUDIT, lacking, printable, refuse

#: What values of unknown origin may raise while they are judged.
_UNJUDGED = (MemoryError, ArithmeticError, ValueError, TypeError, LookupError, RecursionError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `audit`."""
    parser.add_argument("path", nargs="+", type=Path, metavar="PATH", help="a checkpoint's folder, or one file of it")
    parser.add_argument("--against", type=Path, metavar="B", help="another checkpoint of the same run, or its export")
    parser.add_argument(
        "--rate",
        type=rate,
        action="append",
        default=[],
        help="moe_router_bias_update_rate, where the checkpoint does not say; repeat it if it changed",
    )
    parser.add_argument(
        "--protect",
        choices=("all", "buffers"),
        default="all",
        help="buffers: router parameters in low precision are no problem (default: all)",
    )
    parser.add_argument(
        "--for",
        dest="engines",
        action="append",
        default=[],
        metavar="ENGINE==VERSION",
        help="say what this engine will make of the routers of an export; repeat it, or separate several by commas",
    )
    parser.add_argument("--json", action="store_true", help="everything, as JSON, instead of the table")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write one page that needs no network")
    parser.add_argument("--repair", type=Path, metavar="OUT", help="write what can be restored into a new folder")
    parser.add_argument(
        "--shift-bias",
        action="store_true",
        help="with --repair: also write expert biases shifted to where bf16 is finest; no choice changes",
    )
    parser.add_argument(
        "--router-dtype",
        choices=("float32", "bfloat16"),
        help="with --repair and --against: OUT is a copy of this export, with the router tensors of checkpoint B",
    )
    parser.add_argument(
        "--search-limit",
        type=gigabytes,
        default=SEARCH_LIMIT / 1e9,
        metavar="GB",
        help="how many GB of unnamed optimizer buffers to search for main copies (default: 2.1; inf: all)",
    )


def rate(text: str) -> float:
    """The value of --rate. If it is no number, argparse's message contains the name of this function."""
    value = float(text)
    if not (math.isfinite(value) and 1e-12 < value < 1e6):
        raise argparse.ArgumentTypeError(f"expected a positive rate such as 1e-3, found {text!r}")
    return value


def gigabytes(text: str) -> float:
    """The value of --search-limit."""
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected gigabytes, 0 or more, or inf, found {text!r}")
    return value


def main(arguments: argparse.Namespace) -> int:
    """Audit, print, and return the exit code: 0 good, 1 a problem was found, 2 could not tell or bad input."""
    try:
        return _main(arguments)
    except BrokenPipeError:
        raise
    except ImportError as error:
        if error.name not in AUDIT:
            raise
        return _refuse(lacking(error.name, *AUDIT))
    except (Fp32RouterError, OSError) as error:
        return _refuse(str(error))


def _refuse(why: str) -> int:
    return refuse("audit", why)


def _main(arguments: argparse.Namespace) -> int:
    from megatron_fp32_router.audit import audit, open_checkpoint, printing
    from megatron_fp32_router.serving.contracts import find

    engines = [find(asked) for option in arguments.engines for asked in option.split(",")]
    if arguments.shift_bias and not arguments.repair:
        return _refuse("--shift-bias goes with --repair OUT, which is where shifted biases are written")
    if arguments.router_dtype and (not (arguments.repair and arguments.against) or arguments.shift_bias):
        return _refuse("--router-dtype goes with --repair OUT and --against CHECKPOINT, and not with --shift-bias")
    if len(arguments.path) > 1 and (arguments.repair or arguments.html):
        return _refuse("--html and --repair take one PATH")
    if arguments.html is not None:
        _check_page(arguments.html, arguments.path[0])
    if arguments.repair is not None:
        from megatron_fp32_router.audit.repair import check_target

        check_target(arguments.repair, arguments.path[0])
    limit = int(min(arguments.search_limit * 1e9, sys.maxsize))
    against = None
    if arguments.against is not None:
        against = open_checkpoint(arguments.against, search_limit=0, progress=printing.progress(sys.stderr))
        against.notes.clear()
    codes: list[int] = []
    printed: list[dict[str, Any]] = []
    for path in arguments.path:
        try:
            checkpoint = open_checkpoint(path, search_limit=limit, progress=printing.progress(sys.stderr))
            found = audit(checkpoint, against, rates=arguments.rate, protect=arguments.protect)
            if engines:
                from megatron_fp32_router.serving import export

                found.findings += export.questions(checkpoint, against, engines, export.read_config(checkpoint))
            result = found.to_json()
        except (Fp32RouterError, *_UNJUDGED) as error:
            why = str(error)
            if not isinstance(error, Fp32RouterError):
                why = f"{path}: its values cannot be judged: {type(error).__name__}: {why[:200]}"
            # The other paths are still read.
            printed.append({"checkpoint": {"path": str(path)}, "verdict": "unknown", "error": why})
            codes.append(_refuse(why))
            continue
        codes.append(found.exit_code)
        if arguments.html is not None:
            from megatron_fp32_router.audit.page import page

            # Names in a file may hold halves of characters, which no encoding has.
            arguments.html.write_text(page(found, _asked(arguments)), encoding="utf-8", errors="backslashreplace")
        if not arguments.json:
            printing.show(found, sys.stdout)
        if arguments.router_dtype is not None:
            from megatron_fp32_router.audit.fill import fill

            assert against is not None
            result["repair"] = fill(checkpoint, against, arguments.repair, arguments.router_dtype)
        elif arguments.repair is not None:
            from megatron_fp32_router.audit.repair import repair

            result["repair"] = repair(found, arguments.repair, shift_bias=arguments.shift_bias)
        if arguments.repair is not None and not arguments.json:
            _show_repair(result["repair"], arguments.repair)
        printed.append(result)
    if arguments.json:
        print(json.dumps(printed[0] if len(printed) == 1 else printed, indent=2, allow_nan=False))
    return 1 if 1 in codes else max(codes)


def _asked(arguments: argparse.Namespace) -> dict[str, str]:
    """The options that change verdicts, for the page."""
    asked = {
        "--against": str(arguments.against or ""),
        "--rate": " ".join(f"{rate:g}" for rate in arguments.rate),
        "--protect": "" if arguments.protect == "all" else arguments.protect,
        "--for": ",".join(arguments.engines),
    }
    return {name: value for name, value in asked.items() if value}


def _check_page(page: Path, path: Path) -> None:
    """Refuse a page that cannot be written, or that would replace a file of the checkpoint, before anything is read."""
    if page.is_dir() or not page.absolute().parent.is_dir():
        found = "a folder" if page.is_dir() else "no folder to put it in"
        raise Fp32RouterError(f"{page}: expected a file that can be written, found {found}")
    inside = page.resolve().is_relative_to(path.resolve())
    if page.exists() and inside and page.suffix not in (".html", ".htm"):
        raise Fp32RouterError(f"{page}: is a file of the checkpoint; it was not written over")


def _show_repair(done: dict[str, Any], out: Path) -> None:
    file = out / "router.safetensors"
    if "replaced" in done:
        counts = f"{len(done['replaced'])} router tensors replaced and {len(done['added'])} added"
        print(f"repair: {counts}, {done['dtype']}, in the copy {out}")
    elif done["restored"]:
        print(f"repair: {len(done['restored'])} tensors restored exactly, in {file}")
    else:
        print("repair: nothing")
    if done.get("shifted"):
        print(f"repair: {len(done['shifted'])} expert_bias tensors shifted, in {file}")
    for what in ("restored", "shifted", "written"):
        for name, why in done.get(f"not_{what}", {}).items():
            print(f"repair: not {what}: {printable(name)}: {why}")
