"""The plain mixed-precision optimizer's checkpoints with fp32 router parameters.

Float16OptimizerWithFloat16Params keeps a list of fp32 main copies beside the inner optimizer's state and pairs the two
by position, as if every parameter had such a copy. An fp32 parameter has none and shifts the pairs behind it: another
parameter's state is saved, or the save fails (0.11 to 0.19; main repaired it in #5929).

Here an fp32 parameter stands in that list as its own main copy, while Megatron saves or loads. The numbers then agree,
and the layout is the one of a run without the plugin, so it can be turned on or off between two runs: the main copy of
a bf16 router weight is the fp32 router weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from megatron_fp32_router.errors import CheckpointRefusedError
from megatron_fp32_router.registry import mismatch, replaces
from megatron_fp32_router.settings import PREFIX


def _has_native_fp32(optimizer: Any) -> bool:
    """Whether the optimizer updates fp32 parameters of the model directly, beside others through a main copy."""
    return any(getattr(optimizer, "fp32_from_fp32_groups", ())) and any(optimizer.float16_groups)


@contextlib.contextmanager
def _complete_groups(optimizer: Any) -> Iterator[list[list[bool]]]:
    """Show Megatron's methods lists with a pair for every parameter, in the inner optimizer's order.

    Yields:
        For every group and parameter of the lists, whether it is its own main copy.
    """
    names = ("float16_groups", "fp32_from_float16_groups", "fp32_from_fp32_groups")
    kept = {name: getattr(optimizer, name) for name in names}
    model_of = {
        id(main): parameter
        for parameters, mains in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True)
        for parameter, main in zip(parameters, mains, strict=True)
    }
    mains = [list(group["params"]) for group in optimizer.optimizer.param_groups]
    optimizer.float16_groups = [[model_of.get(id(main), main) for main in group] for group in mains]
    optimizer.fp32_from_float16_groups = mains
    # dev leaves out of the lists whatever stands here (#5929): nothing is to be left out.
    optimizer.fp32_from_fp32_groups = [[] for _ in mains]
    try:
        yield [[id(main) not in model_of for main in group] for group in mains]
    finally:
        vars(optimizer).update(kept)


def state_with_every_main_copy(original: Callable[..., Any]) -> Callable[..., Any]:
    """Float16OptimizerWithFloat16Params.state_dict, which the legacy checkpoint format is made of."""

    @replaces(original)
    def state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _has_native_fp32(self):
            return original(self, *args, **kwargs)
        with _complete_groups(self):
            return original(self, *args, **kwargs)

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
        if not _has_native_fp32(self):
            return original(self, model_sharded_state_dict, is_loading, *args, **kwargs)
        with _complete_groups(self) as native:
            state = original(self, model_sharded_state_dict, is_loading, *args, **kwargs)
        if is_loading:
            for entries, flags in zip(state["fp32_from_fp16_params"], native, strict=True):
                for entry, own in zip(entries, flags, strict=True):
                    if own:
                        entry.data = entry.data.detach().clone()
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
        if not _has_native_fp32(self) or saved == [len(group) for group in self.float16_groups]:
            # Without the fp32 parameters in the lists: saved by a Megatron that leaves them out. They come from the
            # model's own entries, which hold them in fp32.
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
