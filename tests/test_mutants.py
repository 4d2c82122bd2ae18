"""A Megatron whose router core is changed in a way that matters: refused by `check`, and when it is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bootstrap import NEWEST, ensure_release
from checking import FINALIZE, MOE_UTILS, ROUTER, check, copier

from megatron_fp32_router.patching.gate import look
from megatron_fp32_router.patching.megatron import Megatron, read_version
from megatron_fp32_router.patching.records import PATCHES

MODULE = "megatron/core/transformer/module.py"
DDP = "megatron/core/distributed/distributed_data_parallel.py"
LOGITS = "logits = router_gating_linear(input, self.weight, self.bias, router_dtype)"
UPDATE = "_update_router_expert_bias(model, config, tp_dp_cp_group=tp_dp_cp_group)"
CHOICE = "    def routing(self, logits: torch.Tensor, padding_mask: Optional[torch.Tensor] = None):\n"
BIAS = "            )\n            self.register_buffer(\n                'expert_bias',"

#: What is changed: file, old text, new text, and the target that has to be named. The old texts stand in the newest
#: release, and in main beyond it.
MUTANTS = {
    "logits are scaled": (ROUTER, LOGITS, f"{LOGITS} * 0.5", "Router.gating"),
    "tokens are scaled before gating": (
        ROUTER,
        "input = self.apply_input_jitter(input)",
        "input = 2 * self.apply_input_jitter(input)",
        "TopKRouter.forward",
    ),
    "another update rule": (
        MOE_UTILS,
        "torch.sign(offset) * expert_bias_update_rate",
        "torch.tanh(offset) * expert_bias_update_rate",
        "get_updated_expert_bias",
    ),
    "a renamed buffer": (
        ROUTER,
        "'local_tokens_per_expert',\n                torch.zeros(",
        "'tokens_seen',\n                torch.zeros(",
        "TopKRouter.__init__",
    ),
    "the counter is saved": (
        ROUTER,
        f"                persistent=False,\n{BIAS}",
        BIAS,
        "TopKRouter.__init__",
    ),
    "tokens are counted twice": (
        ROUTER,
        "self._apply_expert_bias(routing_map, padding_mask=padding_mask)",
        "self._apply_expert_bias(routing_map, padding_mask=padding_mask)\n"
        "        self._apply_expert_bias(routing_map, padding_mask=padding_mask)",
        "TopKRouter.routing",
    ),
    "the gradient has another sign": (
        MOE_UTILS,
        "grad_input = torch.mm(grad_output,",
        "grad_input = -torch.mm(grad_output,",
        "RouterGatingLinearFunction.backward",
    ),
    "the update comes twice": (
        FINALIZE,
        f"        {UPDATE}\n",
        f"        {UPDATE}\n        {UPDATE}\n",
        "finalize_model_grads",
    ),
    "eval mode is updated too": (
        FINALIZE,
        "                and module.training\n",
        "",
        "_update_router_expert_bias",
    ),
    "weights are initialised otherwise": (
        ROUTER,
        "self.weight.data = self.weight.data.to(dtype=self.config.params_dtype)",
        "self.weight.data = self.weight.data.half()",
        "Router.reset_parameters",
    ),
    "an override goes around the casts": (
        ROUTER,
        "    def set_layer_number(self",
        "    def _apply(self, fn): ...\n\n    def set_layer_number(self",
        "Router._apply",
    ),
    "the model is cast after it was wrapped": (
        MODULE,
        "        self.float16_convertor = float16_convertor\n",
        "        self.float16_convertor = float16_convertor\n        self.module.to(torch.float16)\n",
        "Float16Module.__init__",
    ),
    "experts are chosen by another function": (
        ROUTER,
        "    topk_routing_with_score_function,\n    z_loss_func,\n)\n",
        "    z_loss_func,\n)\nfrom megatron.core.fusions.fused_router import topk_routing_with_score_function\n",
        "topk_routing_with_score_function",
    ),
    "logits come from another function": (
        ROUTER,
        "    router_gating_linear,\n",
        "    scaled_gating_linear as router_gating_linear,\n",
        "router_gating_linear",
    ),
    "counts are summed over other ranks": (
        MOE_UTILS,
        "from megatron.core import parallel_state\n",
        "from megatron.core.inference import parallel_state\n",
        "get_tensor_and_data_parallel_group",
    ),
    "the product is another class's": (
        MOE_UTILS,
        "class RouterGatingLinearFunction(torch.autograd.Function)",
        "class RouterGatingLinearFunction(ScaledFunction)",
        "RouterGatingLinearFunction",
    ),
    "the weight is a property": (
        ROUTER,
        "    def set_layer_number(self",
        "    weight = property(lambda self: self._parameters['weight'] / 2)\n\n    def set_layer_number(self",
        "Router.weight",
    ),
    "tokens are scaled around forward": (
        ROUTER,
        "    def set_layer_number(self",
        "    def __call__(self, input, *args):\n        return super().__call__(2 * input, *args)\n\n"
        "    def set_layer_number(self",
        "Router.__call__",
    ),
    "the bias is a parameter": (
        ROUTER,
        "            self.register_buffer(\n                'expert_bias',",
        "            self.register_parameter(\n                'expert_bias',",
        "TopKRouter.__init__",
    ),
    "experts are chosen without gradients": (
        ROUTER,
        CHOICE,
        f"    @torch.no_grad()\n{CHOICE}",
        "TopKRouter.routing",
    ),
    "a loop replaces methods": (
        ROUTER,
        "class InferenceTopKRouter(",
        "for name in ('gating', 'routing'):\n    setattr(TopKRouter, name, scaled(getattr(TopKRouter, name)))\n\n\n"
        "class InferenceTopKRouter(",
        "TopKRouter.routing",
    ),
    "the counter begins anew in every forward": (
        ROUTER,
        "input = self.apply_input_jitter(input)",
        "self.local_tokens_per_expert.zero_()\n        input = self.apply_input_jitter(input)",
        "TopKRouter.forward",
    ),
    "other parameters": (
        DDP,
        "        config: TransformerConfig,\n        ddp_config: DistributedDataParallelConfig,\n",
        "        ddp_config: DistributedDataParallelConfig,\n        config: TransformerConfig,\n",
        "DistributedDataParallel.__init__",
    ),
}


def refused(tree: Path, capsys: Any) -> tuple[int, set[str], str]:
    """(exit code of `check`, what has drifted, everything that an import would say against patches of the core)."""
    code, report = check(capsys, "--for", "router", "--megatron", tree)
    megatron = Megatron(tree / "megatron/core", read_version(tree / "megatron/core/package_info.py"))
    said = [look(patch, megatron, "").objection or "" for patch in PATCHES if patch.area == "router"]
    drifted = {t["target"] for t in report["targets"] if t["state"] in ("drifted", "missing")}
    return code, drifted, "\n".join(said)


@pytest.mark.parametrize("what", MUTANTS)
def test_a_changed_core_is_refused_by_check_and_at_import(what: str, tmp_path: Path, capsys: Any) -> None:
    file, old, new, target = MUTANTS[what]
    tree = copier(tmp_path)(NEWEST, file, old, new)
    code, drifted, said = refused(tree, capsys)
    assert code == 1
    assert {name for name in drifted if name.endswith(f".{target}")}
    assert file in said


def test_an_unchanged_core_is_not_refused(capsys: Any) -> None:
    code, drifted, said = refused(ensure_release(NEWEST), capsys)
    assert (code, drifted, said.strip()) == (0, set(), "")
