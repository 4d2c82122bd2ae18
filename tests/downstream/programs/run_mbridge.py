"""mbridge: a Hugging Face checkpoint to a Megatron model, trained a little, and back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import hugging_face
import transformer_engine_stub  # noqa: F401
from common import CPU, begin, dtypes, end, identical, parallel, rounded, routers, train
from mbridge import AutoBridge
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from safetensors.torch import load_file
from transformers import AutoConfig


def _map_local_layers(bridge: Any) -> None:
    """mbridge knows the names of TransformerEngine's layers: those of Megatron's local ones are told in these."""
    original = bridge._weight_name_mapping_mcore_to_hf

    def mapping(name: str) -> list[str]:
        name = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
        return list(original(re.sub(r"local_experts\.(\d+)\.(linear_fc\d\.weight)", r"\2\1", name)))

    bridge._weight_name_mapping_mcore_to_hf = mapping


def one(name: str, folder: Path) -> dict[str, Any]:
    """Import, train, export and save a model of the family `name`."""
    gates = hugging_face.write(name, folder / name)
    config = AutoConfig.from_pretrained(folder / name)
    config.rope_theta = config.rope_parameters["rope_theta"]  # where transformers 4 has it
    bridge = AutoBridge.from_config(config)
    bridge.set_extra_args(**CPU)
    bridge._get_transformer_layer_spec = lambda vp_stage=None: get_gpt_decoder_block_spec(bridge.config, False)
    _map_local_layers(bridge)
    model = bridge.get_model(weight_path=str(folder / name))
    seen: dict[str, Any] = {"dtypes": dtypes(model)}
    # What mbridge hands on of a weight; of a bias it hands on everything.
    seen["imported"] = all(rounded(router.weight) for _, router in routers(model))
    for (_, router), gate in zip(routers(model), [gates[key] for key in gates if key.endswith("weight")], strict=True):
        router.weight.data.copy_(gate)
    exported = {key: tensor for key, tensor in bridge.export_weights(model) if key in gates}
    seen["exported"] = {key: identical(exported[key], gates[key]) for key in gates}
    bridge.save_weights(model, str(folder / f"{name}-saved"))
    saved = {}
    for file in (folder / f"{name}-saved").glob("*.safetensors"):
        saved |= load_file(file)
    seen["saved"] = {key: identical(saved[key], gates[key]) for key in gates}
    return seen | train(model, bridge.config)


def main() -> None:
    """The families, each in the same process, as a conversion job does them."""
    folder = begin()
    parallel()
    end(folder, models={name: one(name, folder) for name in ("qwen3-moe", "glm-4.5")})


main()
