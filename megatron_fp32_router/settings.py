"""Every environment variable, in one table: parsed strictly, and read when the plugin is turned on.

Standard library only: this is imported at interpreter start-up in every process that turns the plugin on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from megatron_fp32_router.errors import SettingsError

PREFIX: Final = "MEGATRON_FP32_ROUTER"

#: Tokens of a router's first micro-batch that the monitor computes with in a look, evenly spread over it.
SAMPLE: Final = 512

OnMismatch = Literal["raise", "warn"]


@dataclass(frozen=True)
class Settings:
    """What the plugin was asked to do. README's table of variables has the same text (scripts/docs).

    Attributes:
        protect: `all`: parameters and buffers of the router stay fp32. `buffers`: `weight` and `bias` are left to
            Megatron, so checkpoints and optimizers keep their layout.
        accepted: The file that `check --accept` wrote: changes in Megatron's source that a passing probe has proven
            harmless.
        on_mismatch: What happens when a patch does not fit this Megatron or a router tensor is below fp32: an error, or
            one warning on rank 0 that says what is unprotected.
        untested: Optimizers and wrappers that no test has run with fp32 router parameters (docs/limits.md): an error
            before the first step, or one warning.
        agree_timeout: How many seconds, before the first step, to wait for a slow rank to say that it runs the plugin
            alike. A rank that shares a process group of Megatron's with this one and says nothing in that time stops
            the program. `0`: ranks are not compared.
        products: How router products are computed (docs/performance.md). `auto`: split bf16 products where the device
            and the tensors allow, plain ones elsewhere. `split`: split ones, or an error that says why not; on a CPU
            they are emulated, slowly. `fp32`: plain ones, without TF32. All three are as exact as fp32.
        like: For reinforcement learning: the forward rounds where that engine does (docs/serving.md), for example
            `vllm==0.33.0/deepseek_v3`. An engine, version or architecture without a contract is an error.
        monitor: A number of steps: every N-th step the routers are looked at (docs/monitor.md).
        monitor_dir: The folder that the monitor's `monitor.jsonl` goes to; rank 0 makes it.
        monitor_record: A number of tokens, at most 512: every look also writes that many inputs of each router to a
            file beside `monitor.jsonl`, for `parity` (docs/serving.md). The newest four looks are kept.
        log: The least severe message that is shown.
    """

    protect: Literal["all", "buffers"] = "all"
    accepted: str = ""
    on_mismatch: OnMismatch = "raise"
    untested: Literal["refuse", "allow"] = "refuse"
    agree_timeout: float = 300
    products: Literal["auto", "split", "fp32"] = "auto"
    like: str = ""
    monitor: int = 0
    monitor_dir: str = "fp32_router_monitor"
    monitor_record: int = 0
    log: Literal["info", "debug", "warning"] = "info"

    def updated(self, protect: str | None = None, on_mismatch: str | None = None) -> Settings:
        """These settings with the given fields replaced (None leaves a field as it is).

        Raises:
            SettingsError: a value is not one of the accepted ones.
        """
        given = {"protect": protect, "on_mismatch": on_mismatch}
        checked = {
            variable.field: _one_of(value, variable.values, f"enable({variable.field}=…)")
            for variable in VARIABLES
            if (value := given.get(variable.field)) is not None
        }
        return replace(self, **checked)


def _one_of(value: str, values: tuple[str, ...], name: str) -> Any:
    if value in values:
        return value
    listed = ", ".join(repr(item) for item in values if item)
    raise SettingsError(f"{name} has the value {value!r}; accepted are {listed}")


def _text(value: str, name: str) -> Any:
    """A path. The code that uses it reports what is wrong with it."""
    return value


def _seconds(value: str, name: str) -> Any:
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < float("inf"):
        raise SettingsError(f"{name} has the value {value!r}; accepted is a number of seconds, 0 or more")
    return seconds


def _steps(value: str, name: str) -> Any:
    if value == "off":
        return 0
    if not (value.isascii() and value.isdigit() and int(value)):
        raise SettingsError(
            f"{name} has the value {value!r}; accepted are 'off' and a whole number of steps, at least 1"
        )
    return int(value)


def _tokens(value: str, name: str) -> Any:
    if not (value.isascii() and value.isdigit() and int(value) <= SAMPLE):
        raise SettingsError(f"{name} has the value {value!r}; accepted is a whole number of tokens, 0 to {SAMPLE}")
    return int(value)


def _engine(value: str, name: str) -> Any:
    """Checks the form only. The engine is looked up when Megatron's router is patched."""
    if value and not re.fullmatch(r"[\w-]+==[^/?\s]+/\w+(\?\w+=[^&\s]+(&\w+=[^&\s]+)*)?", value):
        raise SettingsError(
            f"{name} has the value {value!r}; accepted is ENGINE==VERSION/ARCHITECTURE, for example "
            "vllm==0.33.0/deepseek_v3, with ?KEY=VALUE for a key of config.json that the engine looks at"
        )
    return value


@dataclass(frozen=True)
class Variable:
    """One environment variable.

    Attributes:
        field: of Settings, "" for the switch.
        values: what is accepted, as documentation shows it, the default first.
        parse: makes a setting of (the value, the name for the error); None: it is one of `values`.
    """

    field: str
    values: tuple[str, ...]
    parse: Callable[[str, str], Any] | None = None

    @property
    def name(self) -> str:
        """The variable as it is set."""
        return f"{PREFIX}_{self.field.upper()}" if self.field else PREFIX

    def read(self, environ: Mapping[str, str]) -> Any:
        """The setting. An empty variable is how launch scripts spell "not set".

        Raises:
            SettingsError: the value is not accepted.
        """
        value = environ.get(self.name, "").strip() or self.values[0]
        return self.parse(value, self.name) if self.parse else _one_of(value, self.values, self.name)


#: The one table. README's table is generated from it (scripts/docs), and unknown_names() compares against it.
VARIABLES: Final = (
    Variable("", ("", "1", "0")),
    Variable("protect", ("all", "buffers")),
    Variable("accepted", ("",), _text),
    Variable("on_mismatch", ("raise", "warn")),
    Variable("untested", ("refuse", "allow")),
    Variable("agree_timeout", ("300",), _seconds),
    Variable("products", ("auto", "split", "fp32")),
    Variable("like", ("", "ENGINE==VERSION/ARCHITECTURE"), _engine),
    Variable("monitor", ("off", "N"), _steps),
    Variable("monitor_dir", ("fp32_router_monitor",), _text),
    Variable("monitor_record", ("0", "N"), _tokens),
    Variable("log", ("info", "debug", "warning")),
)


def switch(environ: Mapping[str, str] = os.environ) -> bool | None:
    """`1` turns the plugin on in every interpreter that has it installed. `0` wins over everything: the import, `run`
    and `enable()` then do nothing but say so. Unset: only an explicit import turns it on.

    Returns:
        True for `1`, False for `0`, None when unset.

    Raises:
        SettingsError: any other value.
    """
    return {"": None, "1": True, "0": False}[VARIABLES[0].read(environ)]


def from_environment(environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings that the environment asks for.

    Raises:
        SettingsError: a variable has a value that is not accepted; the message lists the accepted ones.
    """
    found = Settings(**{variable.field: variable.read(environ) for variable in VARIABLES if variable.field})
    if found.monitor_record and not found.monitor:
        raise SettingsError(
            f"{PREFIX}_MONITOR_RECORD is {found.monitor_record}, and {PREFIX}_MONITOR is off: inputs are recorded only "
            "when the monitor looks; set both"
        )
    return found


def unknown_names(environ: Mapping[str, str] = os.environ) -> list[str]:
    """One sentence for every variable that looks like one of ours and is not in the table.

    It looks like one with our prefix, or with all the words of it, switched on.
    """
    known = [variable.name for variable in VARIABLES]
    sentences = []
    for name in sorted(environ):
        similar = all(word in name.upper() for word in ("MEGA", "FP32", "ROUT"))  # as the start-up module has it
        meant = name.startswith(PREFIX) or (similar and environ[name].strip() not in ("", "0"))
        if meant and name not in known:
            import difflib

            near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.0)[0]
            sentences.append(f"{name} is not a variable of this plugin and has no effect; did you mean {near}?")
    return sentences
