"""What a patch record says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

#: Where its issues and pull requests are.
UPSTREAM: Final = "https://github.com/NVIDIA/Megatron-LM"

#: What a job may use of Megatron, and what of it the plugin touches. `router` is what every job uses: it has to fit
#: when Megatron is imported. Anything else that has changed stops only the job that uses it, when it does.
AREAS: Final = {
    "router": "casts, gating, the choice of experts, counting, the balance update, the look after wrapping",
    "schedules": "pipeline schedules",
    "data_parallel": "Megatron's DistributedDataParallel",
    "optimizer": "the mixed-precision optimizer, and its checkpoints",
    "distributed": "the distributed optimizer, and its checkpoints",
    "torch_dist": "distributed checkpoints: loading",
    "offload": "CPU offload of the optimizer",
    "layer_wise": "the layer-wise optimizer",
    "fsdp": "FSDP: Megatron's and torch's",
    "refit": "refit between two models",
    "inference": "the inference router",
    "monitor": "the monitor",
}

#: Why a patch is not for a Megatron: its function is not there, or upstream does by itself what the patch is for.
Needless: TypeAlias = Literal["absent", "native"]

#: What megatron.training uses unless its arguments say otherwise, and the distributed optimizer, which most jobs use.
USUAL: Final = ("router", "data_parallel", "optimizer", "distributed", "torch_dist")


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
        area: what the patch is needed for, one of AREAS.
        since: the first release that has the function. This and the next two are for documentation: a commit between
            two releases may call itself either, so what decides is the code (`absent_where`, `native_where`).
        until: the first release that needs no such patch, None while there is none.
        gone: whether the function itself went with `until`; otherwise upstream does there what the patch was for.
        absent_where: facts about the source (compat.source.Tree.holds), any of which makes it right that there is no
            such function.
        native_where: facts, any of which shows that upstream does by itself what the patch is for.
        whole: whether the patch replaces the function or relies on what is in it: then its body has to be a known one.
            False: its parameters and `uses` are all that the patch relies on.
        uses: facts that all have to hold where `whole` is False.
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
    area: str = "router"
    since: str = "0.11"
    until: str | None = None
    gone: bool = False
    absent_where: tuple[str, ...] = ()
    native_where: tuple[str, ...] = ()
    whole: bool = True
    uses: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    inherited: bool = False
    needs: tuple[str, ...] = ()
    supersedes: bool = False
    monitor: bool = False
    essential: bool = True

    def why_needless(self, how: Needless) -> str:
        """Why a Megatron needs no such patch, as the end of a sentence about it."""
        return "has no such function" if how == "absent" else f"needs no such patch: {self.remove_when}"

    @property
    def target(self) -> str:
        """The target's full dotted name."""
        return f"{self.module}.{self.path}"
