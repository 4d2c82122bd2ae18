"""Whose function is this: a patch's, that of another copy of the plugin, Megatron's, or somebody else's?"""

from __future__ import annotations

from pathlib import Path
from types import FunctionType
from typing import Any, Final

#: Marks our replacements, so that a re-imported plugin recognises its own patches. Its value is the replacement itself:
#: functools.wraps copies attributes, so somebody else's wrapper around ours has the mark too, but is not its value.
MARK: Final = "__megatron_fp32_router__"

#: The name of its factory: two patches may share a target, and then one wraps the other.
MADE_BY: Final = "__megatron_fp32_router_factory__"

#: Where a replacement sits in its module.
PLACE: Final = "__megatron_fp32_router_place__"

#: A replacement may hold here what disable() is to call, beside putting the original back.
AT_UNDO: Final = "__megatron_fp32_router_at_undo__"

#: This copy of the package. There may be two in a process.
HOME: Final = Path(__file__).resolve().parents[1]


def is_ours(function: Any) -> bool:
    """Whether `function` is a replacement of ours, and not somebody else's wrapper around one."""
    return getattr(function, MARK, None) is function


def home(replacement: Any) -> Path:
    """The copy of the package that a replacement of ours was made by."""
    file = Path(replacement.__globals__["__file__"]).resolve()
    return next((folder for folder in file.parents if folder.name == HOME.name), file)


def _megatrons_own(function: Any) -> bool:
    """Whether Megatron itself defines `function`, asked of its globals: functools.wraps copies everything else.

    Torch's own decorators (no_grad) around Megatron's function are Megatron's doing.
    """
    if not isinstance(function, FunctionType):
        return False
    module = str(function.__globals__.get("__name__"))
    if module.startswith("torch.") and hasattr(function, "__wrapped__"):
        return _megatrons_own(function.__wrapped__)
    return module.startswith("megatron.core.")


def somebody_elses(function: Any) -> bool:
    """Whether `function` is neither ours nor Megatron's."""
    return not (is_ours(function) or _megatrons_own(function))


def name_of(function: Any) -> str:
    if is_ours(function):
        return f"the copy of the plugin in {home(function)}"
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"
