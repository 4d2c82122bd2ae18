"""What the readers return: router tensors with their values and main copies; and which names are those of routers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from megatron_fp32_router.audit.pickles import Opaque

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Parameters, which PROTECT=buffers leaves to Megatron; everything else is a buffer.
PARAMETERS: Final = ("weight", "bias")

#: What an export needs for an engine; counters stay behind.
SERVED: Final = (*PARAMETERS, "expert_bias")

_BUFFERS = "expert_bias|local_tokens_per_expert|global_tokens_per_expert|ga_steps|qb_beta|qb_beta_accum|qb_beta_count"

#: Megatron: TopKRouter is `router` of every MoE layer.
_MEGATRON: Final = re.compile(rf"(?:^|\.)router\.(?P<kind>weight|bias|{_BUFFERS})$")

#: Hugging Face: (pattern of the end of a name, kind). docs/audit.md has the models that use each.
_HUGGING_FACE: Final = tuple(
    (re.compile(rf"(?:^|\.){pattern}$"), kind)
    for pattern, kind in (
        (r"(?:mlp|moe|ffn|feed_forward|block_sparse_moe|mixer)\.gate(?:\.wg)?\.weight", "weight"),
        (r"(?:mlp|moe|ffn|feed_forward|block_sparse_moe)\.gate\.bias", "bias"),
        (r"(?:mlp|feed_forward|moe|block_sparse_moe)\.router(?:\.gate|\.classifier|\.layer)?\.weight", "weight"),
        (r"(?:mlp|feed_forward|moe|block_sparse_moe)\.router(?:\.gate|\.classifier)?\.bias", "bias"),
        (r"(?:[\w]+\.)?(?:gate|router|moe_statics|mlp|block_sparse_moe|mixer)\.e_score_correction_bias", "expert_bias"),
        (r"(?:mlp|moe|feed_forward|block_sparse_moe)\.(?:gate\.)?expert_bias", "expert_bias"),
        (r"moe\.router_bias", "expert_bias"),
    )
)

_LAYER: Final = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d{1,9})\.")


def kind_of(name: str, hugging_face: bool = False) -> str | None:
    """Which router tensor has this name: "weight", "bias", "expert_bias", …; None: not a router's."""
    found = _MEGATRON.search(name)
    if found is not None:
        return found["kind"]
    if hugging_face:
        return next((kind for pattern, kind in _HUGGING_FACE if pattern.search(name)), None)
    return None


@dataclass(frozen=True)
class RouterTensor:
    """One router's tensor. `values` has the dtype on disk: float32 [experts, hidden] for a weight, or bfloat16, …"""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    #: None: of a dtype that cannot be read into NumPy; `dtype` says which.
    values: NDArray[Any] | None
    #: The optimizer's own copy of a parameter, same shape, and where it was found.
    main: NDArray[Any] | None = None
    main_from: str = ""

    @property
    def key(self) -> tuple[str, int, str]:
        """(stack, layer, kind): the same for one router in a Megatron and in a Hugging Face checkpoint."""
        layer, *inner = _LAYER.findall(self.name) or ["-1"]
        stack = (
            "mtp" if re.search(r"(?:^|\.)mtp\.", self.name) else "encoder" if ".encoder." in self.name else "decoder"
        )
        if stack == "mtp" and inner:  # HybridModel: each depth has its own layers
            stack, layer = f"mtp.{layer}", inner[-1]
        return stack, int(layer), self.kind


@dataclass
class Checkpoint:
    """What was read of one checkpoint."""

    path: Path
    #: For people: "torch_dist (DCP)", "legacy torch", "safetensors".
    format: str
    tensors: list[RouterTensor] = field(default_factory=list)
    #: safetensors: layers that have experts, and so must have a router.
    expert_layers: set[int] = field(default_factory=set)
    #: Training steps, where the checkpoint or its folder says.
    iteration: int | None = None
    #: moe_router_bias_update_rate, where the checkpoint holds Megatron's arguments.
    rate: float | None = None
    #: What could not be read, as sentences for people.
    notes: list[str] = field(default_factory=list)
    bytes_read: int = 0
    bytes_on_disk: int = 0

    def note_layer(self, name: str) -> None:
        """Add the layer of a tensor to `expert_layers` if its Hugging Face name is that of a routed expert's."""
        layer = _LAYER.search(name)
        if layer is not None and ".experts." in name:
            self.expert_layers.add(int(layer[1]))


_STACKED: Final = re.compile(r"((?:^|\.)layers\.)(?!\d)")

#: No model is deeper, so a stack with more layers is left as one tensor: it would fill the table.
_MAX_LAYERS: Final = 10_000


def unstack(tensor: RouterTensor) -> list[RouterTensor]:
    """One tensor per router.

    torch_dist stores homogeneous layers as one tensor with the layer in front: "decoder.layers.mlp.router.weight",
    [layers, experts, hidden].
    """
    stacked = len(tensor.shape) == (3 if tensor.kind == "weight" else 2) and _STACKED.search(tensor.name)
    if not stacked or tensor.shape[0] > _MAX_LAYERS:
        return [tensor]
    front, back = tensor.name[: stacked.end()], tensor.name[stacked.end() :]
    return [
        replace(
            tensor,
            name=f"{front}{layer}.{back}",
            shape=tensor.shape[1:],
            values=None if tensor.values is None else tensor.values[layer],
            main=None if tensor.main is None else tensor.main[layer],
        )
        for layer in range(tensor.shape[0])
    ]


def read_arguments(checkpoint: Checkpoint, root: dict[Any, Any]) -> None:
    """Fill in iteration and rate from Megatron's common state."""
    iteration, rate = root.get("iteration"), argument(root, "moe_router_bias_update_rate")
    if type(iteration) is int and 0 <= iteration < 1 << 62 and checkpoint.iteration is None:
        checkpoint.iteration = iteration
    if isinstance(rate, float) and 0 < rate < 1e38 and checkpoint.rate is None:
        checkpoint.rate = rate


def argument(root: dict[Any, Any], name: str) -> Any:
    """One of the command line's arguments; Megatron saves them whole, as a Namespace."""
    args = root.get("args")
    if isinstance(args, Opaque):
        return args.field(name)
    return args.get(name) if isinstance(args, dict) else None
