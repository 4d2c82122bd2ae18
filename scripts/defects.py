"""Which of upstream's precision defects a Megatron release has: what must be shown there, and then be gone.

Each defect is tested on the releases that have it, and on no other: see ledger.py and test_matrix.py. D15 and D22 are
shown with TransformerEngine's Python and kernels of the same arithmetic (lab/transformer_engine.py), and in tests/gpu
with its own; D19 to D21 are described in docs/ as limits.
"""

from __future__ import annotations

from typing import NamedTuple

from bootstrap import RELEASES
from packaging.version import Version

from megatron_fp32_router.patching.record import Patch
from megatron_fp32_router.patching.records import PATCHES

#: Release lines, oldest first; the patch releases of a line behave alike.
LINES = tuple(dict.fromkeys(release.rpartition(".")[0] for release in RELEASES))


class Defect(NamedTuple):
    """A way in which Megatron loses router precision, and the first and last release line that has it."""

    says: str
    first: str = LINES[0]
    last: str = LINES[-1]


DEFECTS = {
    "D1": Defect("expert_bias is bf16 in forward and update", last="0.11"),
    "D2": Defect("expert_bias is rounded when a checkpoint is loaded before the first forward", last="0.13"),
    "D3": Defect("expert_bias is saved as bf16 before the first forward", last="0.13"),
    "D4": Defect("expert_bias is bf16 between wrapping and the first forward"),
    "D5": Defect("values loaded before wrapping are rounded by it"),
    "D6": Defect("tokens per expert are counted and reduced in bf16 or fp16"),
    "D7": Defect("the update step is rounded to bf16: 0.00099945 instead of 0.001"),
    "D8": Defect("fp16 counts overflow, and nothing is balanced"),
    "D9": Defect("the counters of the global auxiliary loss are bf16 or fp16", first="0.15"),
    "D10": Defect("qb_beta and qb_beta_accum are bf16 before the first forward", first="0.19"),
    "D11": Defect("InferenceTopKRouter works with a bf16 expert_bias", first="0.17"),
    "D12": Defect("the router's weight is stored in bf16"),
    "D13": Defect("the router's bias parameter is stored in bf16", first="0.15"),
    "D14": Defect("the gradient of the router's weight is rounded in every micro-batch"),
    "D15": Defect(
        "router gradients are computed in TF32, with TransformerEngine and moe_router_dtype=fp32", first="0.13"
    ),
    "D16": Defect("scores are rounded to bf16 before expert_bias is added", last="0.17"),
    "D17": Defect("logits are computed in bf16 while moe_router_dtype is unset"),
    "D18": Defect("off the meta device the weight is rounded and the buffers are whatever memory held", first="0.13"),
    "D22": Defect("TransformerEngine's fused router refuses the bf16 bias of InferenceTopKRouter", first="0.17"),
    "D23": Defect(
        "a padding mask is broadcast along experts instead of tokens: a crash, or wrong counts", first="0.16"
    ),
    "D24": Defect("the balance update crashes at a router whose bias is None"),
    "D25": Defect("the reset of the counters crashes at a router whose bias is None", first="0.15"),
}


def defects_of(release: str) -> frozenset[str]:
    """The ids of the defects that *release* ("0.16.1") has."""
    name = ".".join(release.split(".")[:2])
    # A line that is not listed is newer than all of them, such as git main.
    line = LINES.index(name) if name in LINES else len(LINES) - 1
    return frozenset(
        name for name, defect in DEFECTS.items() if LINES.index(defect.first) <= line <= LINES.index(defect.last)
    )


def state_on(patch: Patch, release: str) -> str:
    """`needed`, `native` (upstream does it by itself there) or `n/a` (there is no such function), on a release."""
    version = Version(release)
    if version < Version(patch.since):
        return "n/a"
    if patch.until is not None and version >= Version(patch.until):
        return "n/a" if patch.gone else "native"
    others = {other.id: other for other in PATCHES}
    if patch.goes_with:
        return "native" if state_on(others[patch.goes_with], release) == "native" else "needed"
    return "needed" if set(patch.repairs) & defects_of(release) else "native"
