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
        until: the first release that no longer has it, None while it lives.
        parameters: parameters of the target that the replacement relies on, in order.
        inherited: whether the target may come from a base class (torch's own method).
        needs: ids of patches of the same module without which this one does harm: under on_mismatch="warn" it is
            left out with them.
        supersedes: whether the replacement works without the original. Somebody else's function in the target's place
            is then left there, as it would be if it had come after ours.
        monitor: installed only where MEGATRON_FP32_ROUTER_MONITOR asks for looks.
        essential: whether training without it is wrong. False: it is only slower.
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
    parameters: tuple[str, ...] = ()
    inherited: bool = False
    needs: tuple[str, ...] = ()
    supersedes: bool = False
    monitor: bool = False
    essential: bool = True

    @property
    def target(self) -> str:
        """The target's full dotted name."""
        return f"{self.module}.{self.path}"
