"""The errors about a wrapped model whose routers are not all in fp32. Imported only where there is one."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_fp32_router.errors import UnprotectedRouterError
from megatron_fp32_router.patching.registry import mismatch
from megatron_fp32_router.settings import PREFIX


def refuse(chunk: str, foreign: Sequence[str], below: Sequence[str]) -> None:
    """Raise, or warn.

    Args:
        chunk: " (model chunk N)" in a virtual pipeline, or "".
        foreign: routers that the plugin does not reach.
        below: tensors that are below fp32.

    Raises:
        UnprotectedRouterError: under on_mismatch="raise".
    """
    if foreign:
        mismatch(
            UnprotectedRouterError,
            f"these routers are not built on Megatron's TopKRouter and are not protected{chunk}: "
            f"{', '.join(foreign[:3])}. Derive them from TopKRouter, call "
            "megatron_fp32_router.protect_router_class(cls) before the model is built (docs/limits.md), or set "
            f"{PREFIX}_ON_MISMATCH=warn.",
        )
    if below:
        listed = ", ".join(below[:3]) + (" …" if len(below) > 3 else "")
        mismatch(
            UnprotectedRouterError,
            f"{len(below)} router tensors are below fp32 after wrapping{chunk}: {listed}. The model was built "
            "before the plugin was active, load_state_dict(assign=True) has put a state's tensors there, Megatron's "
            "router module was reloaded, or another patch casts them. Import megatron_fp32_router before the model is "
            "built and load without assign, or call megatron_fp32_router.protect_model(model) before wrapping it; "
            f"{PREFIX}_ON_MISMATCH=warn trains on as it is.",
        )
