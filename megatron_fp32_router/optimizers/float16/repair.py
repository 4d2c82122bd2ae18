"""The plain mixed-precision optimizer's checkpoints with fp32 router parameters.

Float16OptimizerWithFloat16Params keeps a list of fp32 main copies beside the inner optimizer's state and pairs the two
by position, as if every parameter had such a copy. An fp32 parameter has none, nor has a frozen one, and shifts the
pairs behind it: another parameter's state is saved, or the save fails (0.11 to 0.19; main repaired it in #5929).

Here, while Megatron saves or loads, an fp32 router parameter is in that list as its own main copy. The positions then
agree, and the layout is that of a run without the plugin. So the plugin can be turned on or off between two runs: the
main copy of a bf16 router weight is the fp32 router weight. Frozen parameters, and those that are fp32 without the
plugin too, have no main copy in a checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from megatron_fp32_router.casts.router import is_protected
from megatron_fp32_router.errors import CheckpointRefusedError
from megatron_fp32_router.patching.registry import mismatch, replaces
from megatron_fp32_router.settings import PREFIX


def _own_main_copies(optimizer: Any) -> set[int]:
    """The ids of fp32 router parameters that the optimizer updates directly, and that are bf16 without the plugin."""
    groups = getattr(optimizer, "fp32_from_fp32_groups", ())
    # Megatron's own mark (#5929): such a parameter is fp32 with the plugin off too, and has no main copy then.
    return {id(p) for group in groups for p in group if is_protected(p) and not getattr(p, "keep_in_fp32", False)}


@contextlib.contextmanager
def _complete_groups(optimizer: Any, *, all_of_them: bool = False) -> Iterator[list[list[bool]]]:
    """Show Megatron's methods lists that have the router parameters too, in the inner optimizer's order.

    Args:
        all_of_them: have a pair for every parameter of the optimizer, for code that pairs by position.

    Yields:
        For every group and parameter of the lists, whether it belongs in a checkpoint.
    """
    names = ("float16_groups", "fp32_from_float16_groups", "fp32_from_fp32_groups")
    kept = {name: getattr(optimizer, name) for name in names}
    model_of = {
        id(main): parameter
        for parameters, mains in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True)
        for parameter, main in zip(parameters, mains, strict=True)
    }
    wanted = model_of.keys() | _own_main_copies(optimizer)
    mains = [
        [main for main in group["params"] if all_of_them or id(main) in wanted]
        for group in optimizer.optimizer.param_groups
    ]
    optimizer.float16_groups = [[model_of.get(id(main), main) for main in group] for group in mains]
    optimizer.fp32_from_float16_groups = mains
    # dev leaves out of the lists whatever stands here (#5929): nothing is to be left out.
    optimizer.fp32_from_fp32_groups = [[] for _ in mains]
    try:
        yield [[id(main) in wanted for main in group] for group in mains]
    finally:
        vars(optimizer).update(kept)


def state_with_every_main_copy(original: Callable[..., Any]) -> Callable[..., Any]:
    """Float16OptimizerWithFloat16Params.state_dict, of which the formats `torch` and `torch_dcp` (from 0.12) are made.

    While torch_dcp is loaded, main copies have memory of their own: see sharded_state_with_every_main_copy.
    """

    @replaces(original)
    def state_dict(self: Any, is_loading: bool = False) -> Any:
        given = {"is_loading": True} if is_loading else {}
        own = _own_main_copies(self)
        if not own:
            return original(self, **given)
        with _complete_groups(self):
            state = original(self, **given)
        if is_loading:
            state["fp32_from_fp16_params"] = [
                [main.detach().clone() if id(main) in own else main for main in group]
                for group in state["fp32_from_fp16_params"]
            ]
        return state

    return state_dict


def sharded_state_with_every_main_copy(original: Callable[..., Any]) -> Callable[..., Any]:
    """Float16OptimizerWithFloat16Params.sharded_state_dict, for distributed checkpoints.

    While loading, an fp32 parameter's main copy is read into memory of its own. Distributed checkpoints are read in
    place, and the model's own entry for it, which a run without the plugin has rounded to bf16, may be read last.
    """

    @replaces(original)
    def sharded_state_dict(
        self: Any, model_sharded_state_dict: Any, is_loading: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        own = _own_main_copies(self)
        if not own:
            return original(self, model_sharded_state_dict, is_loading, *args, **kwargs)
        with _complete_groups(self, all_of_them=True) as wanted:
            state = original(self, model_sharded_state_dict, is_loading, *args, **kwargs)
        if is_loading:
            # By position: what FSDP2 has sharded is here by its local part.
            for entries, group in zip(state["fp32_from_fp16_params"], self.optimizer.param_groups, strict=True):
                for entry, main in zip(entries, group["params"], strict=True):
                    if id(main) in own:
                        entry.data = entry.data.detach().clone()
        state["fp32_from_fp16_params"] = [
            list(itertools.compress(*group)) for group in zip(state["fp32_from_fp16_params"], wanted, strict=True)
        ]
        return state

    return sharded_state_dict


def load_every_main_copy(original: Callable[..., None]) -> Callable[..., None]:
    """Float16OptimizerWithFloat16Params.load_state_dict.

    Raises:
        CheckpointRefusedError: the saved lists fit neither layout; nothing has been overwritten
            (under on_mismatch="raise").
    """

    @replaces(original)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        saved = [len(group) for group in state_dict.get("fp32_from_fp16_params", state_dict.get("fp32_from_fp16", ()))]
        if not _own_main_copies(self) or saved == [len(group) for group in self.float16_groups]:
            # A Megatron that leaves fp32 parameters out of the lists has saved it. They are loaded from the model's
            # entries, which are fp32.
            original(self, state_dict)
            return
        with _complete_groups(self):
            expected = [len(group) for group in self.float16_groups]
            if saved != expected:
                mismatch(
                    CheckpointRefusedError,
                    f"this checkpoint has fp32 main copies of {saved} parameters in its groups, and this run needs "
                    f"{expected}. Its optimizer state belongs to another model, or was saved with some router "
                    "parameters in fp32 and others not. No optimizer state has been loaded. Load without it "
                    f"(--no-load-optim), or set {PREFIX} and {PREFIX}_PROTECT as in the run that saved it.",
                )
            original(self, state_dict)

    return load_state_dict
