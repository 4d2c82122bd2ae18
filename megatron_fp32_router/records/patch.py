"""What a patch record says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: Where its issues and pull requests are.
UPSTREAM: Final = "https://github.com/NVIDIA/Megatron-LM"


@dataclass(frozen=True)
class Patch:
    """One patched function.

    Attributes:
        id: a name for messages and status().
        module: the Megatron module that holds the target.
        path: the target inside it, `name` or `Class.method`.
        factory: `room.file:function` inside the package; the function takes the original and returns the replacement.
        why: what goes wrong without it.
        issue: where upstream discusses it.
        remove_when: how to see that upstream made it needless.
        since: the first release that has the function.
        until: the first release that needs no such patch, None while there is none.
        gone: whether the function itself went with `until`; otherwise upstream does there what the patch was for.
        parameters: parameters of the target that the replacement relies on, in order.
        inherited: whether the target may come from a base class (torch's own method).
        needs: ids of patches of the same module without which this one does harm: under on_mismatch="warn" it is
            left out with them.
        supersedes: whether the replacement works without the original. Somebody else's function in the target's place
            is then left there, as it would be if it had come after ours.
        monitor: installed only where MEGATRON_FP32_ROUTER_MONITOR asks for looks.
        essential: whether training without it is wrong. False: it is only slower.
        optional: whether a Megatron without the target's class is right as it is: nothing there can use it.
    """

    id: str
    module: str
    path: str
    factory: str
    why: str
    issue: str
    remove_when: str
    since: str = "0.11"
    until: str | None = None
    gone: bool = False
    parameters: tuple[str, ...] = ()
    inherited: bool = False
    needs: tuple[str, ...] = ()
    supersedes: bool = False
    monitor: bool = False
    essential: bool = True
    optional: bool = False

    @property
    def why_not_from_until(self) -> str:
        """Why a release from `until` on needs no such patch, as the end of a sentence about it."""
        if self.gone:
            return f"has no such function; it went with {self.until}"
        return f"needs no such patch from {self.until} on: {self.remove_when}"

    @property
    def target(self) -> str:
        """The target's full dotted name."""
        return f"{self.module}.{self.path}"
