"""A training as a user of Megatron writes it: data-parallel ranks, a small mixture of experts, five steps.

It knows nothing of any plugin. Every rank prints one line of JSON: the dtypes of the first router's tensors, its
expert_bias, and what that bias must be by exact integer arithmetic on the choices that were seen.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

EXPERTS, TOKENS, STEPS, RATE, START = 8, 64, 5, 1e-3, 0.75


def build() -> tuple[TransformerConfig, Any, Any]:
    """The configuration, the model wrapped for bf16 and data parallelism, and its optimizer."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_moe_experts=EXPERTS,
        moe_router_topk=2,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=RATE,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
        bf16=True,
        params_dtype=torch.bfloat16,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False),
        vocab_size=256,
        max_sequence_length=TOKENS,
        position_embedding_type="rope",
    )
    wrapped = Float16Module(config, model)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    model = DistributedDataParallel(config, ddp, wrapped)
    settings = OptimizerConfig(optimizer="adam", lr=1e-3, bf16=True, params_dtype=torch.bfloat16)
    optimizer = get_megatron_optimizer(settings, [model])
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    return config, model, optimizer


def forward_step(batches: Any, model: Any) -> tuple[torch.Tensor, Any]:
    """One micro-batch, as Megatron's schedule asks for it."""
    tokens_BS = next(batches)
    positions_BS = torch.arange(TOKENS).expand_as(tokens_BS)
    mask = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).triu(1)
    losses_BS = model(tokens_BS, positions_BS, mask, labels=tokens_BS.roll(-1, 1))
    return losses_BS, lambda losses: (losses.float().mean(), {})


def main() -> None:
    """Train, and print what became of the routers."""
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    _, model, optimizer = build()
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    for router in routers:
        router.expert_bias.fill_(START)

    counts_E = torch.zeros(EXPERTS, dtype=torch.int64)

    def count(_router: Any, _inputs: Any, outputs: Any) -> None:
        counts_E.add_(outputs[1].bool().sum(0))

    routers[0].register_forward_hook(count)
    exact_E = torch.full((EXPERTS,), START, dtype=torch.float32)
    torch.manual_seed(dist.get_rank())
    for _ in range(STEPS):
        counts_E.zero_()
        model.zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(torch.randint(0, 256, (2, 4, TOKENS))),
            model=[model],
            num_microbatches=2,
            seq_length=TOKENS,
            micro_batch_size=4,
            forward_only=False,
        )
        optimizer.step()
        total_E = counts_E.clone()
        dist.all_reduce(total_E)
        exact_E += torch.sign(total_E.sum() - EXPERTS * total_E).float() * RATE

    tensors = dict(routers[0].named_parameters()) | dict(routers[0].named_buffers())
    dtypes = {name: str(tensor.dtype) for name, tensor in tensors.items() if tensor is not None}
    seen = {"dtypes": dtypes, "bias": routers[0].expert_bias.tolist(), "exact": exact_E.tolist()}
    # One write for line and line end: the ranks share a pipe, and print() may let another rank's line in between.
    os.write(1, f"rank {os.environ['RANK']}: {json.dumps(seen)}\n".encode())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
