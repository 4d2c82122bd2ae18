"""A small model of Megatron's local layers, wrapped for bf16, as a framework builds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import EXPERTS, SEQUENCE, TOPK, VOCABULARY
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig


def model(prepare: Callable[[GPTModel], None] = lambda gpt: None, **fields: Any) -> tuple[TransformerConfig, Any]:
    """(config, wrapped model) of two layers.

    Args:
        prepare: is given the model before it is wrapped.
        fields: further ones of the configuration.
    """
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOPK,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=1e-3,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
        normalization="RMSNorm",
        moe_grouped_gemm=False,
        bf16=True,
        params_dtype=torch.bfloat16,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        **fields,
    )
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_decoder_block_spec(config, use_transformer_engine=False),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
    )
    for layer in gpt.decoder.layers:
        layer.mlp.router.expert_bias.fill_(0.75)
    prepare(gpt)
    return config, Float16Module(config, gpt)
