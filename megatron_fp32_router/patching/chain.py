"""The wrappers that lie on a function, and taking one of ours off again.

wrapt has both from 2.4 on. Packages that are often installed beside Megatron pin an older one, so these are our own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import wrapt


def wrapper_chain(function: Any) -> Iterator[Any]:
    """`function`, what it wraps, and so on to a function that wraps nothing: whatever has a __wrapped__ counts."""
    seen: list[Any] = []
    # By identity: wrapt's proxies are equal to what they wrap.
    while not any(function is one for one in seen):
        seen.append(function)
        yield function
        try:
            function = function.__wrapped__
        except AttributeError:
            return


def unwrap(target: Any, path: str, replacement: Any) -> None:
    """Put back what `replacement`, which is the outermost one at `path`, wraps.

    A method that its class inherits is deleted there, so that nothing is left behind.

    Raises:
        ValueError: something else is there; nothing is changed.
    """
    found: tuple[Any, str, Any] = wrapt.resolve_path(target, path)
    owner, name, current = found
    if current is not replacement:
        raise ValueError(f"{path} of {target!r} is {current!r}; expected {replacement!r}")
    original = replacement.__wrapped__
    bases = owner.__mro__[1:] if isinstance(owner, type) else ()
    inherited = next((vars(base)[name] for base in bases if name in vars(base)), None)
    if inherited is original:
        delattr(owner, name)
    else:
        setattr(owner, name, original)
