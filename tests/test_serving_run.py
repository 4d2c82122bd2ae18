"""The contracts of transformers, by running: an fp32 router goes in, and we look at what becomes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_fp32_router.serving.contracts import engines

ENGINE = engines()["transformers"]
DTYPES = {"float32": torch.float32, "model": torch.bfloat16}

#: The smallest model of each; what one does not know, its configuration ignores.
SMALL: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "num_experts": 8, "n_routed_experts": 8,
    "num_local_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
    "n_shared_experts": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FURTHER: dict[str, dict[str, Any]] = {
    "Qwen3NextForCausalLM": {"layer_types": ["full_attention", "full_attention"]},
    "KimiLinearForCausalLM": {"layer_types": ["linear_attention", "full_attention"]},
    "NemotronHForCausalLM": {"layers_block_type": ["moe", "attention"], "moe_shared_expert_intermediate_size": 16},
}


@pytest.mark.parametrize("architecture", [model.architectures[0] for model in ENGINE.models])
def test_transformers_makes_of_an_fp32_router_what_its_contract_says(architecture: str, tmp_path: Path) -> None:
    assert transformers.__version__ in ENGINE.versions  # pyproject.toml pins it
    kind = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = kind(kind.config_class(**(SMALL | FURTHER.get(architecture, {})))).to(torch.bfloat16)
    exact = {name: torch.randn(tensor.shape) for name, tensor in routers(model).items()}
    for name, values in exact.items():
        owner, _, last = name.rpartition(".")
        getattr(model.get_submodule(owner), last).data = values
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "config.json").read_text()) | {"dtype": "bfloat16"})
    )
    # What saving does is not the question: all of it is fp32 on disk.
    loaded = kind.from_pretrained(tmp_path, dtype="auto")
    assert loaded.get_input_embeddings().weight.dtype == torch.bfloat16

    contract = ENGINE.model(architecture).tensors
    found = routers(loaded)
    assert found.keys() == exact.keys()
    assert {part(name) for name in found} == contract.keys() - {"logits"}
    for name, tensor in found.items():
        dtype = DTYPES[contract[part(name)][0].dtype]
        assert tensor.dtype == dtype, name
        assert torch.equal(tensor, exact[name].to(dtype)), name

    seen: list[torch.dtype] = []
    owner = next(name.rpartition(".")[0] for name in found if part(name) == "weight")
    loaded.get_submodule(owner).register_forward_hook(lambda module, given, out: seen.append(out[0].dtype))
    loaded(torch.tensor([[3, 4, 5]]))
    assert seen == [DTYPES[contract["logits"][0].dtype]]


def routers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of every router."""
    return {
        name: tensor.detach()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if name.endswith((".gate.weight", ".router.weight", ".router.bias", "e_score_correction_bias"))
    }


def part(name: str) -> str:
    last = name.rpartition(".")[2]
    return "expert_bias" if last == "e_score_correction_bias" else last
