"""What to build and how to lay it out: one frozen record that tests, the demo and the worker processes share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from megatron_fp32_router.errors import Fp32RouterError


class LabError(Fp32RouterError):
    """The laboratory was asked for something it, this Megatron, or this machine cannot do."""


@dataclass(frozen=True)
class Recipe:
    """A tiny model with mixture-of-experts layers, and the layout to train it in. Sizes are counts, not bytes."""

    #: "hybrid": HybridModel, in which attention and mixture of experts are layers of their own and take turns.
    model: Literal["gpt", "hybrid"] = "gpt"

    #: Sizes of the parallel dimensions. Experts are spread inside the data-parallel ranks.
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    virtual_pipeline: int | None = None
    expert_parallel: int = 1
    data_parallel: int = 1

    #: Layers that have experts. A hybrid model has as many attention layers between them.
    layers: int = 2
    #: Whether a hybrid model has a Mamba layer before each attention layer; its kernels are the laboratory's.
    mamba: bool = False
    #: Depths of multi-token prediction, each of an attention layer and two with experts. Hybrid models only.
    mtp: int = 0
    hidden: int = 64
    heads: int = 4
    experts: int = 8
    topk: int = 2
    moe_ffn: int = 64
    #: Tokens are bytes.
    vocab: int = 256

    seq_length: int = 64
    micro_batch: int = 2
    #: Micro-batches per rank and step (gradient accumulation).
    micro_batches: int = 2

    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    #: Megatron's moe_router_dtype; 0.11 has no such option.
    router_dtype: Literal["fp32", "fp64"] | None = None
    score_function: Literal["sigmoid", "softmax"] = "sigmoid"
    expert_bias: bool = True
    bias_rate: float = 1e-3
    #: Written into every expert_bias after the model is wrapped, into whatever dtype the buffer then has:
    #: the state that a long run reaches.
    bias_start: float = 0.0
    load_balancing: Literal["none", "aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn"] = "none"
    aux_coeff: float = 1e-2
    #: add_bias_linear: gives routers a `bias` parameter from 0.15. 0.11 and 0.12.0 take it only with the dispatcher
    #: allgather (see `extra`), 0.12.1 to 0.14 not at all.
    linear_bias: bool = False

    #: Data parallelism. "fsdp2": torch's, by Megatron's TorchFullyShardedDataParallel; with the plain optimizer.
    #: "megatron_fsdp": with the distributed optimizer, and on a CPU inside `cpu_fsdp.megatron_fsdp`.
    wrapper: Literal["ddp", "fsdp2", "megatron_fsdp"] = "ddp"
    optimizer: Literal["plain", "distributed"] = "plain"
    #: Overlap of gradient reduction (and, distributed, of parameter gathering) with computation.
    overlap: bool = True
    #: An Adam that keeps `step` in its parameter group, as apex's and TransformerEngine's FusedAdam do:
    #: the distributed optimizer's checkpoints cannot handle torch's own.
    fused_adam: bool = False
    recompute: bool = False
    lr: float = 1e-3
    clip_grad: float = 1.0
    seed: int = 1234

    #: Further fields of TransformerConfig, OptimizerConfig and DistributedDataParallelConfig.
    extra: Mapping[str, Any] = field(default_factory=dict)
    optimizer_extra: Mapping[str, Any] = field(default_factory=dict)
    ddp_extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise LabError for what no release could build."""
        for name in ("tensor_parallel", "pipeline_parallel", "expert_parallel", "data_parallel", "layers"):
            if getattr(self, name) < 1:
                raise LabError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.data_parallel % self.expert_parallel:
            raise LabError(
                f"expert_parallel={self.expert_parallel} must divide data_parallel={self.data_parallel}: "
                "experts are spread over the data-parallel ranks"
            )
        stages = self.pipeline_parallel * (self.virtual_pipeline or 1)
        if self.layers % stages:
            raise LabError(f"layers={self.layers} must be a multiple of the {stages} pipeline stages")
        if (self.mtp or self.mamba) and self.model != "hybrid":
            raise LabError(f"mtp={self.mtp} and mamba={self.mamba} need model='hybrid', found {self.model!r}")

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel

    @property
    def uses_sequence_parallel(self) -> bool:
        """Whether activations are split along the sequence, as Megatron demands of experts with tensor parallelism."""
        return self.tensor_parallel > 1

    @property
    def tokens_per_step(self) -> int:
        """Tokens that every router sees in one step, over all ranks."""
        return self.seq_length * self.micro_batch * self.micro_batches * self.data_parallel

    @property
    def hybrid_pattern(self) -> str:
        """As hybrid_layer_pattern: "*" is attention, "E" experts, "M" Mamba, "|" ends a pipeline stage, "/" is MTP."""
        stages = self.pipeline_parallel * (self.virtual_pipeline or 1)
        return "|".join([("M*E" if self.mamba else "*E") * (self.layers // stages)] * stages) + "/*EE" * self.mtp

    def to_json(self) -> dict[str, Any]:
        """As plain values; the `extra` fields must hold only what JSON can."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Recipe:
        """Undo `to_json`. Raises LabError for a name that is no field."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise LabError(f"unknown recipe fields: {', '.join(sorted(unknown))}")
        return cls(**values)
