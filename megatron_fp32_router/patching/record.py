"""What a patch record says. Nothing here, and in no record.py, imports torch or Megatron."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final, Literal, TypeAlias

Function: TypeAlias = Callable[..., Any]
Factory: TypeAlias = Callable[[Function], Function]

#: Where its issues and pull requests are.
UPSTREAM: Final = "https://github.com/NVIDIA/Megatron-LM"

# Megatron's modules that several records name.
ROUTER: Final = "megatron.core.transformer.moe.router"
MOE_UTILS: Final = "megatron.core.transformer.moe.moe_utils"
MODULE: Final = "megatron.core.transformer.module"
FINALIZE: Final = "megatron.core.distributed.finalize_model_grads"
DDP: Final = "megatron.core.distributed.distributed_data_parallel"
OPTIMIZERS: Final = "megatron.core.optimizer"
OPTIMIZER: Final = f"{OPTIMIZERS}.optimizer"
DISTRIBUTED_OPTIMIZER: Final = f"{OPTIMIZERS}.distrib_optimizer"

#: What a job may use of Megatron, and what of it the plugin touches. Every job uses `router`: it has to fit when
#: Megatron is imported. Where another area has changed, a job stops only when it uses what has changed.
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

#: Why a Megatron needs no such patch: it lacks the function, or upstream does by itself what the patch is for.
Needless: TypeAlias = Literal["absent", "native"]

#: What megatron.training uses unless its arguments say otherwise, and the distributed optimizer, which most jobs use.
USUAL: Final = ("router", "data_parallel", "optimizer", "distributed", "torch_dist")


class deferred:
    """A module beside a record, whose functions are factories. It is imported when one of them is called.

    Type checkers and editors follow the import, and see the functions as they are:

        if TYPE_CHECKING:
            from megatron_fp32_router.casts import router
        else:
            router = deferred(__package__, "router")
    """

    def __init__(self, package: str, module: str) -> None:
        self._name = f"{package}.{module}"

    def __getattr__(self, function: str) -> Factory:
        if function.startswith("_"):
            raise AttributeError(function)  # asked by Python itself, say by inspect

        def factory(original: Function) -> Function:
            replacement: Function = getattr(import_module(self._name), function)(original)
            return replacement

        factory.__module__, factory.__name__ = self._name, function
        return factory


@dataclass(frozen=True)
class Patch:
    """One patched function.

    Attributes:
        id: a name for messages and status().
        module: the Megatron module that holds the target.
        path: the target inside it, `name` or `Class.method`.
        factory: takes the original and returns the replacement: a function of a `deferred` module, since a record
            imports no torch. It is called when the target is called for the first time, see `at_once`.
        why: what goes wrong without it.
        issue: where upstream discusses it.
        remove_when: how to see that upstream made it needless.
        repairs: the defects that it repairs, of docs/numerics.md.
        goes_with: of a patch that repairs none: the patch with which it goes.
        area: what the patch is needed for, one of AREAS.
        since: the first release that has the function. This and the next two are for documentation: a commit between
            two releases may call itself either, so what decides is the code (`absent_where`, `native_where`).
        until: the first release that needs no such patch, None while there is none.
        gone: whether the function itself went with `until`; otherwise upstream does there what the patch was for.
        absent_where: facts about the source (source.Tree.holds), any of which makes it right that there is no
            such function.
        native_where: facts, any of which shows that upstream does by itself what the patch is for.
        whole: whether the patch replaces the function or relies on what is in it: then its body has to be a known one.
            False: its parameters and `uses` are all that the patch relies on.
        uses: facts that all have to hold where `whole` is False.
        relies_on: what it relies on beside its target, each `module:name name …`, where a name is `name`, `Class` or
            `Class.method`. A change in any of it is a drift of this patch; of a class named alone the header counts:
            its bases and decorators. Some names exist in no known release: a fork that adds one bypasses the patch.
        parameters: parameters of the target that the replacement relies on, in order, without a method's `self`.
        inherited: whether the target may come from a base class (torch's own method).
        needs: ids of patches of the same module without which this one is unsafe: under on_mismatch="warn" it is
            left out where one of them is.
        supersedes: whether the replacement does the target's work by itself. Somebody else's function that was put in
            the target's place before us is then left there, as one that comes after us would be.
        monitor: installed only where MEGATRON_FP32_ROUTER_MONITOR asks for looks.
        essential: whether training without it is wrong. False: it is only slower.
    """

    id: str
    module: str
    path: str
    factory: Factory
    why: str
    issue: str
    remove_when: str
    repairs: tuple[str, ...] = ()
    goes_with: str = ""
    area: str = "router"
    since: str = "0.11"
    until: str | None = None
    gone: bool = False
    absent_where: tuple[str, ...] = ()
    native_where: tuple[str, ...] = ()
    whole: bool = True
    uses: tuple[str, ...] = ()
    relies_on: tuple[str, ...] = ()
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
    def at_once(self) -> bool:
        """Whether the replacement is made when it is installed.

        A forward goes through the router's module: torch.compile and a graph capture have to see what runs there. A
        monitor that is on from the start begins to look at once.
        """
        return self.module == ROUTER or self.monitor

    @property
    def signature(self) -> tuple[str, ...]:
        """The parameters that the target has to begin with."""
        return ("self", *self.parameters) if "." in self.path else self.parameters

    @property
    def key(self) -> str:
        """The target's name in fingerprints and accepted files: `module:path`."""
        return f"{self.module}:{self.path}"

    @property
    def mechanism(self) -> str:
        """The folder that its record lies in, below the package: `casts`, `optimizers.refit`."""
        return self.factory.__module__.removeprefix("megatron_fp32_router.").rpartition(".")[0]

    @property
    def made_by(self) -> str:
        """The factory by name: a name imported from a patched module may hold what one patch made already."""
        return f"{self.mechanism}:{self.factory.__name__}"

    @property
    def target(self) -> str:
        """The target's full dotted name."""
        return f"{self.module}.{self.path}"
