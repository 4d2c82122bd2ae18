"""Megatron-Bridge's recipes: each one's own function, and the optimizer that Bridge sets up with what it asks for.

The weights and configurations of Hugging Face's models, which a recipe would download, are a small mixture of experts
here, and one rank stands for however many the recipe wants. A recipe of a dense model trains the same mixture.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import pkgutil
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import beside_bridge  # noqa: F401
import torch
import transformers
from common import CPU, EXPERTS, SEQUENCE, TOPK, VOCABULARY, batches, begin, dtypes, end, parallel
from megatron.bridge import AutoBridge, recipes
from megatron.bridge.models import GPTModelProvider
from megatron.bridge.training import config as bridge_config
from megatron.bridge.training.mixed_precision import get_mixed_precision_config
from megatron.bridge.training.optim import setup_optimizer
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from torch.distributed.tensor import DTensor

_RATE = 1e-2


class Provider(GPTModelProvider):
    """A small mixture of experts in the place of any model."""

    def to_text_provider(self) -> Any:
        return self


def provider(**kwargs: Any) -> Any:
    return Provider(
        num_layers=1,
        hidden_size=64,
        ffn_hidden_size=64,
        num_attention_heads=4,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=64,
        moe_router_topk=TOPK,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        transformer_layer_spec=lambda config: get_gpt_decoder_block_spec(config, use_transformer_engine=False),
        normalization="RMSNorm",
        add_bias_linear=False,
        vocab_size=VOCABULARY,
        seq_length=SEQUENCE,
        cross_entropy_loss_fusion=False,
        **CPU,
    )


def _nothing_is_downloaded() -> None:
    bridge = types.SimpleNamespace(to_megatron_provider=provider)
    AutoBridge.from_hf_pretrained = AutoBridge.from_hf_config = lambda *args, **kwargs: bridge
    config = types.SimpleNamespace(model_type="", architectures=["ForCausalLM"])
    config.text_config = config
    transformers.AutoConfig.from_pretrained = lambda *args, **kwargs: config
    gpu = types.SimpleNamespace(major=9, name="NVIDIA H100")  # what some recipes choose a dispatcher by
    torch.cuda.get_device_properties = lambda *args: gpu


def functions() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every function `…_config` that needs no argument, under the name of the module that defines it."""
    for module in pkgutil.walk_packages(recipes.__path__, f"{recipes.__name__}."):
        loaded = importlib.import_module(module.name)
        for name, function in inspect.getmembers(loaded, inspect.isfunction):
            needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
            named = name.endswith("_config") and not name.startswith("_")
            if named and function.__module__ == module.name and not needed:
                yield f"{module.name.removeprefix(recipes.__name__ + '.')}.{name}", function


def precision(asked: Any) -> Any:
    """What a recipe computes in, without fp8 and fp4, which no CPU has."""
    config = get_mixed_precision_config(asked) if isinstance(asked, str) else asked
    config = dataclasses.replace(
        config, fp8=None, fp4=None, fp8_param=False, fp8_param_gather=False, fp4_param=False, fp4_param_gather=False
    )
    config.reuse_grad_buf_for_mxfp8_param_ag = False
    config.finalize()
    return config


def one(cfg: Any) -> dict[str, Any]:
    """Bridge's model and optimizer for a recipe's configuration, and one step."""
    config = provider()
    precision(cfg.mixed_precision or "bf16_mixed").setup(config, cfg.optimizer, cfg.ddp)
    cfg.optimizer.lr, cfg.optimizer.min_lr = _RATE, 0.0
    cfg.optimizer.pin_cpu_grads = cfg.optimizer.pin_cpu_params = False  # no CPU has such memory
    bridge_config._validate_and_sync_distributed_optimizer_settings(cfg)
    for part in (config, cfg.optimizer, cfg.train, cfg.scheduler):
        part.finalize()
    cfg._calculate_scheduler_steps()
    model = config.provide_distributed_model(
        ddp_config=cfg.ddp,
        use_megatron_fsdp=cfg.dist.use_megatron_fsdp or cfg.ddp.use_megatron_fsdp,
        pre_wrap_hook=(lambda chunks: cfg.peft(chunks, training=True)) if cfg.peft is not None else None,
    )
    optimizer, _ = setup_optimizer(
        cfg.optimizer,
        cfg.scheduler,
        model,
        use_gloo_process_groups=cfg.dist.use_gloo_process_groups,
        optimizer_config_override_provider=cfg.optimizer_config_override_provider,
    )
    tokens_BS, positions_BS, mask = next(batches(1))
    model[0](tokens_BS, positions_BS, mask, labels=tokens_BS.roll(-1, 1)).float().mean().backward()
    seen = dtypes(model)  # afterwards Megatron-FSDP shows its main copies in their place
    model[0].finish_grad_sync()
    before = [weight.detach().clone() for weight in _weights(model)]
    for group in optimizer.param_groups:
        group["lr"] = _RATE  # a warm-up begins with a step of nothing
    optimizer.step()
    moved = [not torch.equal(old, new) for old, new in zip(before, _weights(model), strict=True)]
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return {"dtypes": seen, "moved": moved, "optimizers": sorted({type(p.optimizer).__name__ for p in parts})}


def _weights(model: Any) -> list[torch.Tensor]:
    found = [parameter for name, parameter in model[0].named_parameters() if name.endswith("router.weight")]
    # Megatron-FSDP shows sharded ones around its optimizer's step; here one rank has all of them.
    return [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in found]


def settings(cfg: Any) -> str:
    """What an optimizer is made of, but for learning rates: recipes that ask for the same get the same."""
    optimizer = dataclasses.replace(cfg.optimizer, lr=_RATE, min_lr=0.0)
    return repr((optimizer, cfg.ddp, cfg.mixed_precision, cfg.peft is None, cfg.dist.use_megatron_fsdp))


def main() -> None:
    folder = begin()
    parallel()
    _nothing_is_downloaded()
    import megatron_fp32_router.lab.transformer_engine as engine

    seen: dict[str, dict[str, Any]] = {}
    outcomes: dict[str, dict[str, Any]] = {}
    with engine.in_use(Path(os.environ["TRANSFORMER_ENGINE"])):
        for name, function in functions():
            try:
                cfg = function()
            except (NotImplementedError, ValueError) as error:
                seen[name] = {"not made": str(error)}
                continue
            if not isinstance(cfg, bridge_config.ConfigContainer):
                continue  # a part of recipes
            key = settings(cfg)
            if key not in outcomes:
                try:
                    outcomes[key] = one(cfg)
                except Exception as error:
                    line = traceback.extract_tb(error.__traceback__)[-1].line
                    outcomes[key] = {"stopped": type(error).__name__, "said": str(error) or line}
            seen[name] = {**outcomes[key], "adapter": cfg.peft is not None}
    end(folder, recipes=seen, kinds=len(outcomes))


if __name__ == "__main__":
    main()
