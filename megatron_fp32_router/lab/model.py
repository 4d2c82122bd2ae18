"""The configuration of a laboratory's model, and the model itself, whichever release of Megatron it is."""

from __future__ import annotations

import contextlib
import dataclasses
from importlib import import_module
from typing import Any
from unittest import mock

import torch

from megatron_fp32_router.lab import compat, mamba
from megatron_fp32_router.lab.groups import device
from megatron_fp32_router.lab.recipe import LabError, Recipe

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# Configuration ---------------------------------------------------------------------------------------------------


def make_config(recipe: Recipe) -> Any:
    """The TransformerConfig of this release for `recipe`.

    Raises:
        LabError: the release lacks something the recipe asks for.
    """
    compat.check_release(recipe.router_dtype)
    config_class = import_module("megatron.core.transformer.transformer_config").TransformerConfig
    known = {f.name for f in dataclasses.fields(config_class)}
    dtype = _DTYPES[recipe.precision]
    wanted: dict[str, Any] = {
        "num_layers": recipe.layers * (1 + (recipe.model == "hybrid") + recipe.mamba),
        "hidden_size": recipe.hidden,
        "num_attention_heads": recipe.heads,
        # 0.11's SequentialMLP takes its size from here.
        "ffn_hidden_size": recipe.moe_ffn,
        "moe_ffn_hidden_size": recipe.moe_ffn,
        "num_moe_experts": recipe.experts,
        "moe_router_topk": recipe.topk,
        "moe_router_score_function": recipe.score_function,
        "moe_router_enable_expert_bias": recipe.expert_bias,
        "moe_router_bias_update_rate": recipe.bias_rate,
        "moe_router_load_balancing_type": recipe.load_balancing,
        "moe_aux_loss_coeff": 0.0 if recipe.load_balancing == "none" else recipe.aux_coeff,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": False,
        "add_bias_linear": recipe.linear_bias,
        "tensor_model_parallel_size": recipe.tensor_parallel,
        "pipeline_model_parallel_size": recipe.pipeline_parallel,
        "virtual_pipeline_model_parallel_size": recipe.virtual_pipeline,
        "expert_model_parallel_size": recipe.expert_parallel,
        "sequence_parallel": recipe.uses_sequence_parallel,
        "bf16": recipe.precision == "bf16",
        "fp16": recipe.precision == "fp16",
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # Fused kernels are CUDA's or apex's.
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        "deterministic_mode": False,
    }
    if recipe.router_dtype is not None:
        wanted["moe_router_dtype"] = recipe.router_dtype
    if recipe.model == "hybrid":
        wanted |= {"is_hybrid_model": True, "mtp_num_layers": recipe.mtp or None}
    if recipe.mamba:
        wanted |= {"mamba_state_dim": 16, "mamba_head_dim": 16, "mamba_num_groups": 2}
    if recipe.recompute:
        wanted |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    unknown = (set(wanted) | set(recipe.extra)) - known
    if unknown:
        raise LabError(f"Megatron {compat.megatron_version()}: TransformerConfig has no {', '.join(sorted(unknown))}")
    return config_class(**{**wanted, **recipe.extra})


def make_router(config: Any) -> Any:
    """One TopKRouter on the laboratory's device, outside any model. Needs `parallel`."""
    compat.after_import()
    router_class = import_module("megatron.core.transformer.moe.router").TopKRouter
    groups = compat.signature_kwargs(router_class.__init__, pg_collection=0, model_comm_pgs=0)
    # moe_utils' helper is what MoELayer itself uses; older releases look the groups up on their own.
    router = router_class(config, **{name: default_groups() for name in groups})
    compat.fill_router_biases(router)
    if hasattr(router, "set_layer_number"):
        router.set_layer_number(1)
    return router.to(device())


def default_groups() -> Any:
    """The collection of process groups that this release's MoE layers take, from parallel_state; or None."""
    moe_utils = import_module("megatron.core.transformer.moe.moe_utils")
    get = getattr(moe_utils, "get_default_pg_collection", None) or getattr(
        moe_utils, "get_default_model_comm_pgs", None
    )
    return None if get is None else get()


# The model -------------------------------------------------------------------------------------------------------


class LabLayerNorm(torch.nn.LayerNorm):
    """LayerNorm with Megatron's constructor, allowed under sequence parallelism.

    Without apex and TransformerEngine, Megatron's own LayerNorm asserts that sequence parallelism is off. All that is
    needed is the attribute by which finalize_model_grads finds parameters whose gradients are partial sums.
    """

    returns_residual = False

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **ignored: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        for param in self.parameters():
            param.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def make_model(recipe: Recipe, config: Any, stage: int | None) -> Any:
    """One model chunk, in fp32 and unwrapped, on the laboratory's device. `stage`: virtual pipeline stage."""
    state = import_module("megatron.core.parallel_state")
    specs = import_module("megatron.core.models.gpt.gpt_layer_specs")
    if stage is not None:
        state.set_virtual_pipeline_model_parallel_rank(stage)
    virtual = compat.signature_kwargs(state.is_pipeline_first_stage, ignore_virtual=False, vp_stage=stage)
    layer = specs.get_gpt_layer_local_spec(num_experts=recipe.experts, moe_grouped_gemm=False)
    layer.submodules.input_layernorm = LabLayerNorm
    layer.submodules.pre_mlp_layernorm = LabLayerNorm
    make = _hybrid if recipe.model == "hybrid" else _gpt
    model = make(
        recipe,
        layer,
        stage,
        config=config,
        vocab_size=recipe.vocab,
        max_sequence_length=recipe.seq_length,
        pre_process=state.is_pipeline_first_stage(**virtual),
        post_process=state.is_pipeline_last_stage(**virtual),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
    compat.fill_router_biases(model)
    if recipe.linear_bias:
        _let_expert_biases_be_added(model)
    return model.to(device())


def _gpt(recipe: Recipe, layer: Any, stage: int | None, *, config: Any, **kwargs: Any) -> Any:
    """GPTModel: every layer is `layer`."""
    block = import_module("megatron.core.transformer.transformer_block")
    gpt = import_module("megatron.core.models.gpt.gpt_model").GPTModel
    count = block.get_num_layers_to_build(
        config, **compat.signature_kwargs(block.get_num_layers_to_build, vp_stage=stage)
    )
    spec = block.TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=LabLayerNorm)
    kwargs |= compat.signature_kwargs(gpt.__init__, vp_stage=stage)
    return gpt(config=config, transformer_layer_spec=spec, **kwargs)


def _hybrid(recipe: Recipe, layer: Any, stage: int | None, **kwargs: Any) -> Any:
    """HybridModel: attention and experts are layers of their own, made of the two halves of `layer`.

    Megatron's own specifications of it take everything from TransformerEngine.
    """
    block = import_module("megatron.core.models.hybrid.hybrid_block")
    transformer = import_module("megatron.core.transformer.transformer_layer")
    mtp = import_module("megatron.core.transformer.multi_token_prediction")
    spec = type(layer)
    half, parts = transformer.TransformerLayerSubmodules, layer.submodules
    attention = half(
        input_layernorm=LabLayerNorm, self_attention=parts.self_attention, self_attn_bda=parts.self_attn_bda
    )
    experts = half(pre_mlp_layernorm=LabLayerNorm, mlp=parts.mlp, mlp_bda=parts.mlp_bda)
    parallel = import_module("megatron.core.tensor_parallel")
    linear = parallel.ColumnParallelLinear
    depth = mtp.MultiTokenPredictionLayerSubmodules(
        enorm=LabLayerNorm, hnorm=LabLayerNorm, eh_proj=linear, layer_norm=LabLayerNorm
    )
    depths = mtp.MultiTokenPredictionBlockSubmodules([spec(mtp.MultiTokenPredictionLayer, submodules=depth)])
    further = {}
    if recipe.mamba:
        linears = (linear, parallel.RowParallelLinear)
        further["mamba_layer"] = mamba.layer(spec, LabLayerNorm, linears, parts.mlp_bda)
    layers = block.HybridStackSubmodules(
        **further,
        attention_layer=spec(transformer.TransformerLayer, submodules=attention),
        moe_layer=spec(layer.module, submodules=experts),
        mtp_block_spec=spec(mtp.MultiTokenPredictionBlock, submodules=depths),
    )
    with contextlib.ExitStack() as stack:
        # The norm after the last layer, which no specification has.
        stack.enter_context(mock.patch.object(block, "TENorm", LabLayerNorm))
        # Main compares each depth's projection with a class that does not exist without TransformerEngine.
        if hasattr(mtp, "is_inference_column_parallel_linear"):
            stack.enter_context(mock.patch.object(mtp, "is_inference_column_parallel_linear", return_value=False))
        return import_module("megatron.core.models.hybrid.hybrid_model").HybridModel(
            hybrid_stack_spec=spec(block.HybridStack, submodules=layers),
            hybrid_layer_pattern=recipe.hybrid_pattern,
            vp_stage=stage,
            **kwargs,
        )


def _let_expert_biases_be_added(model: Any) -> None:
    """Copy what an expert's last layer returns, before MLP adds the bias to it in place.

    With one tensor-parallel rank that output is also the input of an autograd function, and torch forbids to change
    such a view in place. TransformerEngine's layers, which real runs use, return a new tensor.
    """

    def copy(module: Any, inputs: Any, output: Any) -> Any:
        return output[0].clone(), *output[1:]

    for name, module in model.named_modules():
        if "local_experts" in name and name.endswith("linear_fc2"):
            module.register_forward_hook(copy)
