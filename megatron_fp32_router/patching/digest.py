"""One fingerprint of a whole Megatron, for ranks to compare. Imported only where there are several."""

from __future__ import annotations

import functools
import hashlib

from megatron_fp32_router.patching.gate import known_files, state_of
from megatron_fp32_router.patching.megatron import Megatron


@functools.lru_cache(maxsize=2)
def digest(megatron: Megatron) -> str:
    """One fingerprint of everything that patches replace or rely on in that Megatron, imported or not: 16 digits.

    Ranks compare it. What the gate has read is not read again; in a fork whose every file has changed, all of it takes
    0.3 s.
    """
    if megatron.path is None:
        return "unknown, the source files are not to be found"
    root = megatron.path.parent.parent
    lines = []
    for module in known_files()["modules"]:
        state = state_of(root, module)
        if state is not None:
            lines.append(state["digest"])
            continue
        from megatron_fp32_router.patching import drift

        lines.append(drift.state_digest(module, drift.judge_of(megatron, "").tree))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
