"""The flag sets that well-known recipes train a mixture of experts with: optimizer, data parallelism, router.

Read in Megatron-Bridge 0.6.2 (`megatron/bridge/recipes`, router settings in `megatron/bridge/models`), in
yanring/Megatron-MoE-ModelZoo at e865051 (`model_configs/benchmarking`, `sbatch_benchmarking.sh`), and in the launch
scripts of slime and miles. Left out, as no CPU has them: fp8 and fp4 layers, fused router kernels
(`moe_router_fusion`), grouped GEMMs, DeepEP and HybridEP. The model is the laboratory's, with experts or tensors on two
ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Names of torch's dtypes; scripts/docs reads this file without torch.
F32, BF16, F16 = "float32", "bfloat16", "float16"


@dataclass(frozen=True)
class FlagSet:
    """One set of flags, and the recipes that have it."""

    #: Files below `megatron/bridge/recipes`, or what else says so; in brackets, how many recipes.
    of: str
    #: In words, for docs/limits.md.
    says: str
    #: Of lab.Recipe.
    fields: Mapping[str, Any]
    #: The format to resume from, where Megatron's default goes on with other bits, plugin off or on.
    format: str = ""


# Routers -------------------------------------------------------------------------------------------------------------

_BALANCED: dict[str, Any] = {
    "score_function": "sigmoid",
    "expert_bias": True,
    "bias_rate": 1e-3,
    "router_dtype": "fp32",
}
_GROUPS = {"moe_router_num_groups": 2, "moe_router_group_topk": 1, "moe_router_topk_scaling_factor": 2.5}
_SEQUENCES = {"load_balancing": "seq_aux_loss", "aux_coeff": 1e-4}
_DEEPSEEK = {**_BALANCED, **_SEQUENCES, "extra": {"moe_router_pre_softmax": True, **_GROUPS}}
_GLM = {**_BALANCED, **_SEQUENCES, "extra": {"moe_router_pre_softmax": True}}
_KIMI = {**_GLM, "aux_coeff": 1e-3}
_DEEPSEEK_V4 = {**_BALANCED, "extra": {"moe_router_score_function": "sqrtsoftplus"}}
_MINIMAX = {**_BALANCED, "load_balancing": "aux_loss", "aux_coeff": 1e-3}
_NEMOTRON = {**_BALANCED, **_SEQUENCES, "model": "hybrid"}
_QWEN: dict[str, Any] = {
    "score_function": "softmax",
    "expert_bias": False,
    "load_balancing": "aux_loss",
    "aux_coeff": 1e-3,
}

# Optimizers ----------------------------------------------------------------------------------------------------------

_ADAM = {"weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-8}
_BF16_MOMENTS = {"exp_avg_dtype": BF16, "exp_avg_sq_dtype": BF16}
_OFFLOAD = {
    "optimizer_cpu_offload": True,
    "optimizer_offload_fraction": 1.0,
    "overlap_cpu_optimizer_d2h_h2d": True,
    "pin_cpu_grads": False,  # no GPU, nothing to pin
}
_MUON: dict[str, Any] = {
    **_ADAM,
    "muon_momentum": 0.95,
    "muon_nesterov": True,
    "muon_num_ns_steps": 5,
    "muon_tp_mode": "blockwise",
    "muon_scalar_optimizer": "adam",
}


def _fields(router: dict[str, Any], settings: dict[str, Any], *, reduce: str, **more: Any) -> dict[str, Any]:
    """Of lab.Recipe: the router's, and the optimizer's settings with gradients that are reduced in `reduce`."""
    spread = {} if "tensor_parallel" in more else {"data_parallel": 2, "expert_parallel": 2}
    ddp = {"grad_reduce_in_fp32": reduce == F32, "average_in_collective": more.pop("average", True)}
    small = {"layers": 1, "micro_batches": 1}
    return {**small, "optimizer_extra": settings, "ddp_extra": ddp, **router, **spread, **more}


def _distributed(router: dict[str, Any], *, reduce: str = F32, **more: Any) -> dict[str, Any]:
    return _fields(router, _ADAM, reduce=reduce, optimizer="distributed", fused_adam=True, **more)


def _precision_aware(router: dict[str, Any], dtypes: dict[str, Any], *, reduce: str, **more: Any) -> dict[str, Any]:
    settings = {**_ADAM, "use_precision_aware_optimizer": True, **dtypes}
    return _fields(router, settings, reduce=reduce, optimizer="distributed", **more)


def _muon(router: dict[str, Any], settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    return _fields(router, {**_MUON, **settings}, reduce=F32, **more)


RECIPES: dict[str, FlagSet] = {
    "DeepSeek-V3, Moonlight": FlagSet(
        "deepseek/h100/deepseek_v3.py (2), moonlight/h100/moonlight_16b.py (5)",
        "precision-aware, bf16 gradients and moments",
        _precision_aware(_DEEPSEEK, {"main_grads_dtype": BF16, **_BF16_MOMENTS}, reduce=BF16),
    ),
    "DeepSeek-V4, fp8; model zoo, fp8": FlagSet(
        "deepseek/{h100,gb200,gb300}/deepseek_v4.py: fp8mx (3); sbatch_benchmarking.sh with PR=fp8 or mxfp8",
        "precision-aware, bf16 moments",
        _precision_aware(_DEEPSEEK_V4, {"main_grads_dtype": F32, **_BF16_MOMENTS}, reduce=F32),
    ),
    "DeepSeek-V4, Muon": FlagSet(
        "deepseek/{h100,gb200}/deepseek_v4.py: bf16_muon (2)",
        "Muon, products in fp32 (`highest`)",
        _muon(
            _DEEPSEEK_V4,
            {
                "optimizer": "muon",
                "muon_scale_mode": "unit_rms_norm",
                "muon_fp32_matmul_prec": "highest",
                "muon_extra_scale_factor": 0.2,
                "muon_coefficient_type": "quintic",
                "adam_eps": 1e-20,
            },
        ),
    ),
    "Kimi-K2": FlagSet(
        "kimi/h100/kimi_k2.py (1), kimi_vl/h100/kimi_k25_vl.py (1)",
        "Muon, layer-wise, products in bf16 (`medium`)",
        _muon(_KIMI, {"optimizer": "dist_muon", "muon_scale_mode": "spectral", "muon_fp32_matmul_prec": "medium"}),
    ),
    "GLM-5": FlagSet(
        "glm/{h100,gb200}/glm5.py: pretrain (2)",
        "precision-aware, gradients reduced in bf16, no overlap",
        _precision_aware(_GLM, {}, reduce=BF16, average=False, overlap=False),
    ),
    "MiniMax-M3": FlagSet(
        "minimax/h100/minimax_m3.py: pretrain (1)",
        "precision-aware, gradients reduced in bf16, bf16 moments",
        _precision_aware(_MINIMAX, {"main_grads_dtype": F32, **_BF16_MOMENTS}, reduce=BF16, tensor_parallel=2),
    ),
    "Qwen3-30B-A3B": FlagSet(
        "qwen/h100/qwen3_moe.py: pretrain_16gpu (1)",
        "precision-aware, gradients reduced in bf16",
        _precision_aware(_QWEN, {}, reduce=BF16),
    ),
    "slime, miles": FlagSet(
        "slime's (24) and miles' (51) scripts/run-*.sh",
        "precision-aware, CPU offload of the whole optimizer",
        _precision_aware(_QWEN, _OFFLOAD, reduce=F32, overlap=False),
        format="fully_reshardable",
    ),
    "Nemotron-3 Super": FlagSet(
        "nemotronh/h100/nemotron_3_super.py (3)",
        "precision-aware, fp16 main copies, gradients reduced in bf16, bf16 moments",
        _precision_aware(
            _NEMOTRON, {"main_params_dtype": F16, **_BF16_MOMENTS}, reduce=BF16, average=False, overlap=False
        ),
    ),
    "Nemotron-3 Nano": FlagSet(
        "nemotronh/{h100,gb200}/nemotron_3_nano.py: pretrain (3)",
        "distributed Adam, gradients reduced in bf16",
        _distributed(_NEMOTRON, reduce=BF16),
    ),
    "Qwen3-MoE; model zoo, Qwen3": FlagSet(
        "qwen/h100/qwen3_moe.py (7); Qwen3-30B-A3B.yaml, Qwen3-235B-A22B.yaml",
        "distributed Adam",
        _distributed({**_QWEN, "router_dtype": "fp32"}, tensor_parallel=2),
    ),
}
