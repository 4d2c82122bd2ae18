"""Tiny checkpoints of Hugging Face's models with a mixture of experts, whose routers no bf16 can hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from common import EXPERTS, SEQUENCE, TOPK, VOCABULARY

SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": TOPK,
    "max_position_embeddings": SEQUENCE,
    "tie_word_embeddings": False,
}
GROUPS = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "norm_topk_prob": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": (
        "Qwen3Moe",
        {"num_key_value_heads": 2, "head_dim": 16, "num_experts": EXPERTS, "norm_topk_prob": True},
    ),
    "glm-4.5": (
        "Glm4Moe",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "n_routed_experts": EXPERTS,
            "use_qk_norm": True,
            "attention_bias": True,
            **GROUPS,
        },
    ),
    "deepseek-v3": (
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "n_routed_experts": EXPERTS,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            **GROUPS,
        },
    ),
}


def write(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """Save a model in bf16 with routers in fp32 below `folder`; the routers' tensors, by Hugging Face's names."""
    family, fields = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**SHARED, **fields)
    config.architectures = [f"{family}ForCausalLM"]
    model = getattr(transformers, f"{family}ForCausalLM")(config).bfloat16()
    gates = {}
    for module_name, module in model.named_modules():
        if not module_name.endswith("mlp.gate"):
            continue
        module.weight.data = torch.randn(module.weight.shape) / 8
        gates[f"{module_name}.weight"] = module.weight.data
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias = 0.75 + torch.rand(EXPERTS) / 1000
            gates[f"{module_name}.e_score_correction_bias"] = module.e_score_correction_bias
    model.save_pretrained(folder)
    # Bridge copies it.
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return gates
