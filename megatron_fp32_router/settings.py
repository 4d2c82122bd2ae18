"""Every environment variable, in one table, parsed strictly and read only when asked for.

Standard library only: this is imported at interpreter start-up in every process that turns the plugin on.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, cast

from megatron_fp32_router.errors import SettingsError

PREFIX: Final = "MEGATRON_FP32_ROUTER"

#: Tokens of a router's first micro-batch that the monitor computes with in a look, evenly spread over it.
SAMPLE: Final = 512

Protect = Literal["all", "buffers"]
OnMismatch = Literal["raise", "warn"]
Untested = Literal["refuse", "allow"]
Products = Literal["auto", "split", "fp32"]
LogLevel = Literal["info", "debug", "warning"]


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, the accepted values (default first) and what it decides."""

    name: str
    values: tuple[str, ...]
    meaning: str


#: The one table. README's table is generated from it (scripts/docs), and unknown_names() compares against it.
VARIABLES: Final = (
    Variable(
        PREFIX,
        ("", "1", "0"),
        "`1` turns the plugin on in every interpreter that has it installed. `0` wins over everything: "
        "the import, `run` and `enable()` then do nothing but say so. Unset: only an explicit import turns it on.",
    ),
    Variable(
        f"{PREFIX}_PROTECT",
        ("all", "buffers"),
        "`all`: parameters and buffers of the router stay fp32. `buffers`: `weight` and `bias` are left to "
        "Megatron, so checkpoints and optimizers keep their layout.",
    ),
    Variable(
        f"{PREFIX}_ACCEPTED",
        ("",),
        "The file that `check --accept` wrote: changes in Megatron's source that a passing probe has proven harmless.",
    ),
    Variable(
        f"{PREFIX}_ON_MISMATCH",
        ("raise", "warn"),
        "What happens when a patch does not fit this Megatron or a router tensor is below fp32: an error, or one "
        "warning on rank 0 that says what is unprotected.",
    ),
    Variable(
        f"{PREFIX}_UNTESTED",
        ("refuse", "allow"),
        "Optimizers and wrappers that no test has run with fp32 router parameters (docs/limits.md): an error before "
        "the first step, or one warning.",
    ),
    Variable(
        f"{PREFIX}_AGREE_TIMEOUT",
        ("300",),
        "How many seconds, before the first step, to wait for a slow rank to say that it runs the plugin alike. "
        "A rank that shares a process group of Megatron's with this one and says nothing in that time stops the "
        "program. `0`: ranks are not compared.",
    ),
    Variable(
        f"{PREFIX}_PRODUCTS",
        ("auto", "split", "fp32"),
        "How router products are computed (docs/performance.md). `auto`: split bf16 products where the device and the "
        "tensors allow, plain ones elsewhere. `split`: split ones, or an error that says why not; on a CPU they are "
        "emulated, slowly. `fp32`: plain ones, without TF32. All three are as exact as fp32.",
    ),
    Variable(
        f"{PREFIX}_LIKE",
        ("", "ENGINE==VERSION/ARCHITECTURE"),
        "For reinforcement learning: the forward rounds where that engine does (docs/serving.md), for example "
        "`vllm==0.33.0/deepseek_v3`. An engine, version or architecture without a contract is an error.",
    ),
    Variable(
        f"{PREFIX}_MONITOR",
        ("off", "N"),
        "A number of steps: every N-th step the routers are looked at (docs/monitor.md).",
    ),
    Variable(
        f"{PREFIX}_MONITOR_DIR",
        ("fp32_router_monitor",),
        "The folder that the monitor's `monitor.jsonl` goes to; rank 0 makes it.",
    ),
    Variable(
        f"{PREFIX}_MONITOR_RECORD",
        ("0", "N"),
        "A number of tokens, at most 512: every look also writes so many inputs of each router to a file beside "
        "`monitor.jsonl`, for `parity` (docs/serving.md). The newest four looks are kept.",
    ),
    Variable(
        f"{PREFIX}_LOG",
        ("info", "debug", "warning"),
        "The least severe message that is shown.",
    ),
)


@dataclass(frozen=True)
class Settings:
    """What the plugin was asked to do.

    Attributes:
        protect: "all" keeps parameters and buffers in fp32, "buffers" only the buffers.
        on_mismatch: "raise" stops the program when something is unprotected, "warn" says so and goes on.
        untested: "refuse" stops before the first step where no test has run a combination, "allow" says so and goes on.
        log: the least severe message that is shown.
        products: how router products are computed: "auto", "split" or "fp32".
        agree_timeout: seconds to wait for the other ranks before the first step; 0 compares nothing.
        monitor: look at the routers every so many steps; 0: never.
        monitor_dir: the folder that monitor.jsonl goes to.
        monitor_record: tokens of each router that a look writes down; 0: none.
        accepted: path of the file with accepted changes in Megatron's source, or "".
        like: the engine whose roundings the forward does, or "".
    """

    protect: Protect = "all"
    on_mismatch: OnMismatch = "raise"
    untested: Untested = "refuse"
    products: Products = "auto"
    log: LogLevel = "info"
    agree_timeout: float = 300
    monitor: int = 0
    monitor_dir: str = "fp32_router_monitor"
    monitor_record: int = 0
    accepted: str = ""
    like: str = ""

    def updated(self, protect: str | None = None, on_mismatch: str | None = None) -> Settings:
        """These settings with the given fields replaced (None leaves a field as it is).

        Raises:
            SettingsError: a value is not one of the accepted ones.
        """
        new = self
        if protect is not None:
            checked = _accepted("enable(protect=…)", protect, _table("_PROTECT").values)
            new = replace(new, protect=cast("Protect", checked))
        if on_mismatch is not None:
            checked = _accepted("enable(on_mismatch=…)", on_mismatch, _table("_ON_MISMATCH").values)
            new = replace(new, on_mismatch=cast("OnMismatch", checked))
        return new


def _table(suffix: str) -> Variable:
    return next(variable for variable in VARIABLES if variable.name == PREFIX + suffix)


def _accepted(name: str, value: object, accepted: tuple[str, ...]) -> str:
    if isinstance(value, str) and value in accepted:
        return value
    listed = ", ".join(repr(item) for item in accepted if item)
    raise SettingsError(f"{name} has the value {value!r}; accepted are {listed}")


def _read(suffix: str, environ: Mapping[str, str]) -> str:
    variable = _table(suffix)
    value = environ.get(variable.name, "").strip()
    # An empty variable is how launch scripts spell "not set".
    return _accepted(variable.name, value, variable.values) if value else variable.values[0]


def _seconds(suffix: str, environ: Mapping[str, str]) -> float:
    variable = _table(suffix)
    value = environ.get(variable.name, "").strip() or variable.values[0]
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < float("inf"):
        raise SettingsError(f"{variable.name} has the value {value!r}; accepted is a number of seconds, 0 or more")
    return seconds


def _interval(environ: Mapping[str, str]) -> int:
    name = _table("_MONITOR").name
    value = environ.get(name, "").strip()
    if value in ("", "off"):
        return 0
    if value.isascii() and value.isdigit() and int(value) > 0:
        return int(value)
    raise SettingsError(f"{name} has the value {value!r}; accepted are 'off' and a whole number of steps, at least 1")


def _like(environ: Mapping[str, str]) -> str:
    """The form only. What is known of it is looked up when Megatron's router is patched."""
    name = _table("_LIKE").name
    value = environ.get(name, "").strip()
    if value and not re.fullmatch(r"[\w-]+==[^/?\s]+/\w+(\?\w+=[^&\s]+(&\w+=[^&\s]+)*)?", value):
        raise SettingsError(
            f"{name} has the value {value!r}; accepted is ENGINE==VERSION/ARCHITECTURE, for example "
            "vllm==0.33.0/deepseek_v3, with ?KEY=VALUE for a key of config.json that the engine looks at"
        )
    return value


def _record(environ: Mapping[str, str]) -> int:
    name = _table("_MONITOR_RECORD").name
    value = environ.get(name, "").strip() or "0"
    if not (value.isascii() and value.isdigit() and int(value) <= SAMPLE):
        raise SettingsError(f"{name} has the value {value!r}; accepted is a whole number of tokens, 0 to {SAMPLE}")
    if int(value) and not _interval(environ):
        raise SettingsError(f"{name} is {value}, and {_table('_MONITOR').name} is off: only a look records; set both")
    return int(value)


def switch(environ: Mapping[str, str] = os.environ) -> bool | None:
    """What MEGATRON_FP32_ROUTER says: True for `1`, False for `0`, None when unset.

    Raises:
        SettingsError: any other value.
    """
    return {"": None, "1": True, "0": False}[_read("", environ)]


def from_environment(environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings that the environment asks for.

    Raises:
        SettingsError: a variable has a value that is not accepted; the message lists the accepted ones.
    """
    return Settings(
        protect=cast("Protect", _read("_PROTECT", environ)),
        on_mismatch=cast("OnMismatch", _read("_ON_MISMATCH", environ)),
        untested=cast("Untested", _read("_UNTESTED", environ)),
        products=cast("Products", _read("_PRODUCTS", environ)),
        log=cast("LogLevel", _read("_LOG", environ)),
        agree_timeout=_seconds("_AGREE_TIMEOUT", environ),
        monitor=_interval(environ),
        monitor_dir=environ.get(_table("_MONITOR_DIR").name, "").strip() or _table("_MONITOR_DIR").values[0],
        monitor_record=_record(environ),
        # Any path. It is read, and refused if it is not such a file, when the first module is patched.
        accepted=environ.get(f"{PREFIX}_ACCEPTED", "").strip(),
        like=_like(environ),
    )


def unknown_names(environ: Mapping[str, str] = os.environ) -> list[str]:
    """One sentence for every variable that is not in the table and has our prefix, or all its words, switched on."""
    known = [variable.name for variable in VARIABLES]
    sentences = []
    for name in sorted(environ):
        similar = all(word in name.upper() for word in ("MEGA", "FP32", "ROUT"))  # as the start-up module has it
        meant = name.startswith(PREFIX) or (similar and environ[name].strip() not in ("", "0"))
        if meant and name not in known:
            near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.0)[0]
            sentences.append(f"{name} is not a variable of this plugin and has no effect; did you mean {near}?")
    return sentences
