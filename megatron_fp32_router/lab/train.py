"""Training steps through Megatron's own schedule, gradient finalisation and optimizer, with hooks to watch them."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist

from megatron_fp32_router.lab import compat, emerging
from megatron_fp32_router.lab.groups import chunks_in_training, device
from megatron_fp32_router.lab.model import make_config, make_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from megatron_fp32_router.lab.recipe import Recipe


#: Everything sharded. Its fused scaling of gradients needs NCCL.
_MEGATRON_FSDP: Final = {
    "use_megatron_fsdp": True,
    "data_parallel_sharding_strategy": "optim_grads_params",
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "bucket_size": 40_000_000,
    "gradient_reduce_div_fusion": False,
}


@dataclass(frozen=True)
class Routing:
    """What one router decided in one forward that counts (recomputation's first pass does not).

    `hidden`: the router's input as it came, detached, [..., hidden]. `routing_map`: bool [tokens, experts].
    """

    name: str
    router: Any
    hidden: torch.Tensor
    routing_map: torch.Tensor


@dataclass
class Lab:
    """A model in training. Made by `build`; lives inside `parallel`."""

    recipe: Recipe
    config: Any
    #: DDP-wrapped model chunks: one, or as many as there are virtual pipeline stages.
    chunks: list[Any]
    optimizer: Any
    #: Called with this Lab after the backward passes, before finalize_model_grads zeroes the counters.
    on_counts: list[Callable[[Lab], None]] = field(default_factory=list)
    #: Whether the last optimizer step was taken; fp16 skips one on overflow.
    stepped: bool = True
    grad_norm: float | None = None
    #: Router name -> bool maps [tokens, experts] of this step's micro-batches, after `record_routing()`.
    routing_maps: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def routers(self) -> list[tuple[str, Any]]:
        """(qualified name, TopKRouter) of every router on this rank; "chunkN." leads when there are several."""
        router_class = import_module("megatron.core.transformer.moe.router").TopKRouter
        several = len(self.chunks) > 1
        return [
            (f"chunk{index}.{name}" if several else name, module)
            for index, chunk in enumerate(self.chunks)
            for name, module in chunk.named_modules()
            if isinstance(module, router_class)
        ]

    def step(self, batches: Iterable[dict[str, Any]]) -> float:
        """Train on one global batch: `recipe.micro_batches` items are taken from `batches`.

        Returns:
            Mean loss over micro-batches and data-parallel ranks, in nats per byte, the same on every rank.
        """
        loss = self.step_without_optimizer(batches)
        self.stepped, norm, _ = self.optimizer.step()
        self.grad_norm = None if norm is None else float(norm)
        return loss

    def step_without_optimizer(self, batches: Iterable[dict[str, Any]]) -> float:
        """Forward, backward and finalize_model_grads (which moves expert_bias); parameters stay."""
        self.routing_maps.clear()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        # Every chunk of a virtual pipeline must see the same micro-batches.
        taken = list(itertools.islice(iter(batches), self.recipe.micro_batches))
        run = import_module("megatron.core.pipeline_parallel").get_forward_backward_func()
        several = len(self.chunks) > 1
        losses = run(
            forward_step_func=_forward_step,
            data_iterator=[iter(taken) for _ in self.chunks] if several else iter(taken),
            model=self.chunks,
            num_microbatches=self.recipe.micro_batches,
            seq_length=self.recipe.seq_length,
            micro_batch_size=self.recipe.micro_batch,
            decoder_seq_length=self.recipe.seq_length,
            forward_only=False,
        )
        return mean_over_ranks([float(item["loss"]) for item in losses])

    def record_routing(self, into: Callable[[Routing], None] | None = None) -> contextlib.ExitStack:
        """Record every routing decision, from now until the returned context is left or closed.

        Args:
            into: called with each Routing. By default bool maps are kept in `routing_maps`, which is emptied at the
                start of every step.
        """

        def keep(routing: Routing) -> None:
            self.routing_maps.setdefault(routing.name, []).append(routing.routing_map)

        receive = into or keep

        def hook_for(name: str) -> Callable[..., None]:
            def hook(router: Any, inputs: tuple[Any, ...], output: Any) -> None:
                # Under full recomputation a forward without gradients comes first; Megatron does not count it.
                if torch.is_grad_enabled():
                    receive(Routing(name, router, inputs[0].detach(), output[1].detach().bool()))

            return hook

        stack = contextlib.ExitStack()
        for name, router in self.routers():
            stack.callback(router.register_forward_hook(hook_for(name)).remove)
        return stack

    def main_weight(self, param: torch.Tensor) -> torch.Tensor:
        """The optimizer's fp32 copy of `param`, or `param` itself where it has none. Plain optimizer only."""
        main = getattr(param, "main_param", None)
        return param.detach() if main is None else main.detach()


def build(recipe: Recipe) -> Lab:
    """Build, wrap and equip the model of `recipe`. Call it inside `parallel`.

    Raises:
        LabError: the release lacks something the recipe asks for.
    """
    return wrap(recipe, build_model(recipe))


def build_model(recipe: Recipe) -> list[Any]:
    """The models of this rank as constructed: in params_dtype, without wrappers, without an optimizer.

    One, or as many as there are virtual pipeline stages. All share one config, `model.config`.
    """
    compat.after_import()
    config = make_config(recipe)
    stages = [None] if recipe.virtual_pipeline is None else list(range(recipe.virtual_pipeline))
    return [make_model(recipe, config, stage) for stage in stages]


def wrap(recipe: Recipe, models: list[Any]) -> Lab:
    """Put `models`, as `build_model` returns them, into Float16Module and DDP, and make their optimizer."""
    config = models[0].config
    chunks = [_wrap(recipe, config, model, index) for index, model in enumerate(models)]
    chunks_in_training.update(chunks)
    optimizer = _optimizer(recipe, config, chunks)
    lab = Lab(recipe, config, chunks, optimizer)
    _connect(lab)
    for _, router in lab.routers():
        if getattr(router, "expert_bias", None) is not None:
            router.expert_bias.fill_(recipe.bias_start)
    return lab


def _wrap(recipe: Recipe, config: Any, model: Any, index: int) -> Any:
    distributed = import_module("megatron.core.distributed")
    if recipe.precision != "fp32":
        model = import_module("megatron.core.transformer.module").Float16Module(config, model)
    fields = {
        "grad_reduce_in_fp32": True,
        "overlap_grad_reduce": recipe.overlap,
        "use_distributed_optimizer": recipe.optimizer == "distributed",
        "overlap_param_gather": recipe.overlap and recipe.optimizer == "distributed",
        **(_MEGATRON_FSDP if recipe.wrapper == "megatron_fsdp" else {}),
        **recipe.ddp_extra,
    }
    ddp = distributed.DistributedDataParallelConfig(**fields)
    if recipe.wrapper == "fsdp2":
        return _fsdp2(config, ddp, model)
    if recipe.wrapper == "megatron_fsdp":
        adapter = import_module("megatron.core.distributed.fsdp.mcore_fsdp_adapter")
        return adapter.FullyShardedDataParallel(config, ddp, model)
    # As Megatron's training does: only the first chunk of a virtual pipeline is cut into buckets.
    return distributed.DistributedDataParallel(config, ddp, model, disable_bucketing=index > 0)


def _fsdp2(config: Any, ddp: Any, model: Any) -> Any:
    wrapper = import_module("megatron.core.distributed.torch_fully_sharded_data_parallel").TorchFullyShardedDataParallel
    usual = inspect.signature(wrapper.__init__).parameters["sub_modules_to_wrap"].default
    # Not ColumnParallelLinear, which the local layers contain: Megatron shards layers first, and torch cannot shard
    # anything inside a module that is sharded already.
    kinds = [kind for kind in usual if kind.__name__ != "ColumnParallelLinear"]
    extra = compat.signature_kwargs(wrapper.__init__, ddp_config=ddp)
    return wrapper(config, module=model, sub_modules_to_wrap=kinds, **extra)


def _optimizer(recipe: Recipe, config: Any, chunks: list[Any]) -> Any:
    optimizer = import_module("megatron.core.optimizer")
    fields = {
        "optimizer": "adam",
        "lr": recipe.lr,
        "weight_decay": 0.0,
        "clip_grad": recipe.clip_grad,
        "bf16": config.bf16,
        "fp16": config.fp16,
        "params_dtype": config.params_dtype,
        "initial_loss_scale": 4096.0,  # of fp16
        "use_distributed_optimizer": recipe.optimizer == "distributed",
        **compat.signature_kwargs(
            optimizer.OptimizerConfig,
            overlap_param_gather=recipe.overlap and recipe.optimizer == "distributed",
        ),
        **recipe.optimizer_extra,
    }
    settings = optimizer.OptimizerConfig(**fields)
    if emerging.is_emerging(settings.optimizer):
        return emerging.optimizer_of(settings, chunks)
    if not recipe.fused_adam:
        return optimizer.get_megatron_optimizer(settings, chunks)
    # Only while the optimizer is made, when Adam is looked up: other builds want torch's own.
    # distrib_optimizer: 0.11 checks there that it was given an Adam.
    modules = ("optimizer", "distrib_optimizer")
    candidates: list[Any] = [optimizer, *(getattr(optimizer, name, None) for name in modules)]
    changes: list[tuple[Any, str, Any]] = [
        (module, "Adam", compat.FusedAdamLike) for module in candidates if hasattr(module, "Adam")
    ]
    # Without TransformerEngine and apex, 0.15 and later take torch's own, whatever Adam is.
    if hasattr(optimizer, "USING_PYTORCH_OPTIMIZER"):
        changes.append((optimizer, "USING_PYTORCH_OPTIMIZER", False))
    with compat.replaced(changes):
        return optimizer.get_megatron_optimizer(settings, chunks)


def _connect(lab: Lab) -> None:
    """Give the schedule its callbacks, as Megatron's training loop does."""
    real = import_module("megatron.core.distributed").finalize_model_grads

    def finalize_model_grads(*args: Any, **kwargs: Any) -> Any:
        for look in lab.on_counts:
            look(lab)
        return real(*args, **kwargs)

    def one_or_all(values: list[Any]) -> Any:
        return values[0] if len(values) == 1 else values

    config, recipe = lab.config, lab.recipe
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = lab.optimizer.scale_loss
    if recipe.overlap:
        config.no_sync_func = one_or_all([chunk.no_sync for chunk in lab.chunks])
        if recipe.pipeline_parallel > 1:
            config.grad_sync_func = one_or_all([chunk.start_grad_sync for chunk in lab.chunks])


def _forward_step(batches: Iterator[dict[str, Any]], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    batch = next(batches)
    output = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])

    def loss_of(output_bs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = (output_bs.float() * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
        return loss, {"loss": loss.detach().clone()}

    return output, loss_of


def mean_over_ranks(losses: list[float]) -> float:
    """Only the last pipeline stage has losses; every rank gets their mean."""
    total = torch.tensor([sum(losses), float(len(losses))], dtype=torch.float64, device=device())
    dist.all_reduce(total)
    return float(total[0] / total[1])
