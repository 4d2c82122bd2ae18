"""Keeps everything that Megatron-LM's mixture-of-experts router decides with in fp32.

Importing this package arms it: hooks patch Megatron's own functions in place when Megatron is imported, before or
after this line, as long as it is before the model is built. Only wrapt, packaging and the standard library are
imported here; torch and Megatron are left to the program.

    import megatron_fp32_router
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

from megatron_fp32_router import settings as _settings
from megatron_fp32_router.errors import (
    CannotMirrorError,
    CheckpointRefusedError,
    CombinationRefusedError,
    DisplacedPatchError,
    Fp32RouterError,
    ModelInUseError,
    RanksDisagreeError,
    SettingsError,
    TargetChangedError,
    TargetMissingError,
    UnprotectedRouterError,
)
from megatron_fp32_router.log import say as _say
from megatron_fp32_router.patching import hooks as _hooks
from megatron_fp32_router.patching import undo as _undo
from megatron_fp32_router.patching.registry import PatchStatus, status
from megatron_fp32_router.settings import Settings
from megatron_fp32_router.version import __version__

if TYPE_CHECKING:
    from megatron_fp32_router.wrapping.survey import Survey

__all__ = [
    "CannotMirrorError",
    "CheckpointRefusedError",
    "CombinationRefusedError",
    "DisplacedPatchError",
    "Fp32RouterError",
    "ModelInUseError",
    "PatchStatus",
    "RanksDisagreeError",
    "Settings",
    "SettingsError",
    "TargetChangedError",
    "TargetMissingError",
    "UnprotectedRouterError",
    "__version__",
    "disable",
    "enable",
    "protect_model",
    "protect_router_class",
    "status",
]


def enable(protect: str | None = None, on_mismatch: str | None = None) -> None:
    """Turn the plugin on. Importing the package has done so already; this is for tests and notebooks.

    Args:
        protect: "all" (parameters and buffers) or "buffers"; None takes MEGATRON_FP32_ROUTER_PROTECT.
        on_mismatch: "raise" or "warn"; None takes MEGATRON_FP32_ROUTER_ON_MISMATCH.

    Raises:
        SettingsError: an argument or a variable has a value that is not accepted.
        TargetMissingError: the Megatron that is imported does not fit (under on_mismatch="raise").
    """
    if _settings.switch() is False:
        _say(logging.INFO, f"{_settings.PREFIX}=0: the plugin is off and changes nothing", once=True)
        return
    wanted = _settings.from_environment().updated(protect, on_mismatch)
    for sentence in _settings.unknown_names():
        _say(logging.WARNING, sentence, once=True)
    _hooks.arm(wanted)


def disable() -> None:
    """Turn the plugin off and put Megatron's identical original functions back.

    Models that are protected keep their fp32 tensors; their next forward is upstream's.

    Raises:
        DisplacedPatchError: somebody else's patch sits on one of ours; nothing has been changed then.
    """
    _undo.undo_all()
    _hooks.disarm()


def protect_model(model: Any) -> Survey:
    """Bring the routers of a model that was built before the plugin was active to fp32, in place.

    Bits that the model lost before stay lost: this stops further loss.

    Args:
        model: a torch.nn.Module, or a list of model chunks, before DDP and before an optimizer exists.

    Returns:
        What is there now: dtypes of every router tensor, counted by kind.

    Raises:
        ModelInUseError: DDP has taken hold of the parameters.
    """
    from megatron_fp32_router.wrapping.protect import protect_model

    return protect_model(model)


def protect_router_class(cls: type[Any]) -> None:
    """Protect routers of a class that is not derived from Megatron's TopKRouter, as far as that is generic.

    Call it once, before a model is built, after enable(); disable() takes it back. Its floating-point parameters and
    buffers then stay out of casts, a buffer `local_tokens_per_expert` beside an `expert_bias` counts exactly, and the
    line in the log and its errors speak of it. What the class computes, and in which dtype its constructor makes its
    tensors, is its own. A TopKRouter needs no such call.

    Args:
        cls: a subclass of torch.nn.Module.

    Raises:
        TypeError: it is none.
    """
    from megatron_fp32_router.casts.other_class import protect_class

    protect_class(cls)


def _is_command() -> bool:
    """Whether this is `python -m megatron_fp32_router …`, which imports the package before its __main__ can run."""
    # "-m" stands there only while Python looks for the module; -m may be another program's that imports this package.
    asked_for = sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] if "-m" in sys.orig_argv else []
    return sys.argv[:1] == ["-m"] and asked_for == [__name__]


try:
    enable()
except SettingsError as _error:
    if not _is_command():
        # Without its traceback: the frames are the plugin's, and the message is enough.
        raise _error.with_traceback(None) from None
    # One line and the code for bad input, as from the console script. `run` stops here too: nothing has been run yet.
    print(f"megatron-fp32-router: {_error}", file=sys.stderr)
    sys.exit(2)
