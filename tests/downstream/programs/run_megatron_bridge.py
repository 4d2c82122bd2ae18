"""Megatron-Bridge: a Hugging Face checkpoint to a Megatron model, trained a little, and back; its LoRA on a router."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import hugging_face
import torch
import transformer_engine_stub  # noqa: F401
from common import CPU, begin, dtypes, end, identical, parallel, train
from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.param_mapping import AutoMapping, GatedMLPMapping
from megatron.bridge.models.glm.glm45_bridge import GLM45Bridge
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.peft.lora_layers import LoRATopKRouter
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from safetensors.torch import load_file


class Attention(torch.nn.Module):
    """Causal attention whose keys and values differ in size, which Megatron leaves to TransformerEngine."""

    def __init__(self, *args: Any, softmax_scale: float | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(self, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        heads = [tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)]
        mixed = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, scale=self.scale)
        return mixed.permute(2, 0, 1, 3).flatten(2)


def layers(config: Any) -> Any:
    """Megatron's local layers."""
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    if config.multi_latent_attention:
        for layer in block.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = Attention
    return block


#: What a CPU without TransformerEngine leaves to a user of Bridge.
LOCAL = CPU | {
    "transformer_layer_spec": layers,
    "cross_entropy_loss_fusion": False,
    "mtp_num_layers": None,
    "rope_type": "rope",  # yarn makes its table on a CUDA device
    "bf16": True,
    "params_dtype": torch.bfloat16,
}


def _without_modelopt() -> None:
    """Saving asks nvidia-modelopt whether the model is quantized, and needs nothing else of it."""
    for name in ("modelopt", "modelopt.torch", "modelopt.torch.quantization", "modelopt.torch.quantization.utils"):
        sys.modules[name] = types.ModuleType(name)
    vars(sys.modules["modelopt.torch.quantization.utils"])["is_quantized"] = lambda model: False


def _map_local_experts() -> None:
    """Bridge's GLM-4.5 knows TransformerEngine's grouped experts only; DeepSeek-V3's names of local ones are added."""
    original = GLM45Bridge.mapping_registry

    def mapping_registry(self: Any) -> Any:
        theirs, ours = "model.layers.*.mlp.experts.*", "decoder.layers.*.mlp.experts.local_experts.*"
        return MegatronMappingRegistry(
            *original(self).get_all_mappings(),
            GatedMLPMapping(
                megatron_param=f"{ours}.linear_fc1.weight",
                gate=f"{theirs}.gate_proj.weight",
                up=f"{theirs}.up_proj.weight",
            ),
            AutoMapping(megatron_param=f"{ours}.linear_fc2.weight", hf_param=f"{theirs}.down_proj.weight"),
        )

    GLM45Bridge.mapping_registry = mapping_registry


def built(folder: Path) -> tuple[Any, Any, Any]:
    """(Bridge, provider, model) of the checkpoint in `folder`."""
    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    for field, value in LOCAL.items():
        setattr(provider, field, value)
    provider.finalize()
    return bridge, provider, provider.provide_distributed_model(wrap_with_ddp=False)


def with_lora(folder: Path) -> dict[str, Any]:
    """Train an adapter of each router of the checkpoint in `folder`, whose weights are frozen."""
    _, provider, model = built(folder)
    model = LoRA(target_modules=["router"], dim=4)(model, training=True)
    model = model if isinstance(model, list) else [model]
    wrappers = [module for module in model[0].modules() if isinstance(module, LoRATopKRouter)]
    for wrapper in wrappers:
        torch.nn.init.normal_(wrapper.adapter.linear_out.weight)
    logits = wrappers[0].to_wrap.gating(torch.randn(4, 1, 64).bfloat16())
    seen = {"routers": len(wrappers), "dtypes": dtypes(model), "logits": str(logits.dtype)}
    return seen | train(model, provider)


def shifted(bridge: Any, model: Any) -> dict[str, Any]:
    """What shift_exported does to an export."""
    # Its import turns the plugin on.
    from megatron_fp32_router.serving.shift import shift_exported

    plain = dict(bridge.export_hf_weights(model, show_progress=False))
    after = dict(shift_exported(bridge.export_hf_weights(model, show_progress=False)))
    moved = [key for key in plain if not torch.equal(plain[key], after[key])]
    constants = [(plain[key].double() - after[key].double()).unique() for key in moved]
    return {
        "moved": moved,
        "lowest": [float(after[key].min()) for key in moved],
        "one constant each": [constant.numel() == 1 for constant in constants],
    }


def one(name: str, folder: Path) -> dict[str, Any]:
    """Import, export, save and train a model of the family `name`."""
    gates = hugging_face.write(name, folder / name)
    bridge, provider, model = built(folder / name)
    seen: dict[str, Any] = {"dtypes": dtypes(model)}
    exported = {key: tensor for key, tensor in bridge.export_hf_weights(model, show_progress=False) if key in gates}
    seen["exported"] = {key: identical(exported[key], gates[key]) for key in gates}
    bridge.save_hf_pretrained(model, folder / f"{name}-saved", show_progress=False)
    saved: dict[str, torch.Tensor] = {}
    for file in (folder / f"{name}-saved").glob("*.safetensors"):
        saved |= load_file(file)
    if os.environ.get("MEGATRON_FP32_ROUTER"):
        seen["shifted"] = shifted(bridge, model)
    seen["folder"] = str(folder / f"{name}-saved")
    seen["saved"] = {key: identical(saved[key], gates[key]) for key in gates}
    return seen | train(model, provider)


def main() -> None:
    """The three families, each in the same process, as a conversion job does them."""
    folder = begin()
    parallel()
    _without_modelopt()
    _map_local_experts()
    models = {name: one(name, folder) for name in hugging_face.MODELS}
    end(folder, models=models, lora=with_lora(folder / "glm-4.5"))


main()
