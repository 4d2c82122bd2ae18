"""The audit as one HTML page that loads nothing: findings, and every expert bias as it is on disk."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Final

from megatron_fp32_router import pages
from megatron_fp32_router.audit import printing
from megatron_fp32_router.pages.chart import Chart, Line, side_by_side

if TYPE_CHECKING:
    from collections.abc import Mapping

    from megatron_fp32_router.audit.finding import Audit
    from megatron_fp32_router.audit.tensors import RouterTensor

#: How many of the values that several experts share are named.
_NAMED: Final = 3


def page(found: Audit, settings: Mapping[str, str] | None = None) -> str:
    """The whole document. `settings`: the options that were given, with their values."""
    *read, verdict = printing.summary(found)
    rows = printing.rows(found)
    classes = [{0: "name", 2: printing.STATES[verdict]} for _, _, verdict, _ in rows]
    table = pages.table(printing.COLUMNS, rows, row_classes=classes)
    biases = [drawn for tensor in found.checkpoint.tensors if (drawn := _biases(tensor))]
    explained = (
        "Experts in order of their bias; the axis does not start at 0. A square is a value that several experts have, "
        "bit for bit. Many squares, or steps as high as bf16's spacing, come from a cast or from lost updates."
    )
    return pages.document(
        f"Router audit: {found.verdict}",
        "What a checkpoint on disk says about its routers.",
        [(printing.STATES[found.verdict], "Verdict", verdict.removeprefix("verdict: "))],
        _facts(found, read, settings or {}),
        [
            pages.section("Findings", table),
            *([pages.section("Expert biases", pages.paragraph(explained), side_by_side(*biases))] if biases else []),
        ],
    )


def _facts(found: Audit, read: list[str], settings: Mapping[str, str]) -> dict[str, str]:
    tensors = found.checkpoint.tensors
    experts = sum(
        tensor.values.size for tensor in tensors if tensor.kind == "expert_bias" and tensor.values is not None
    )
    return {
        "Megatron": "a checkpoint does not say which version wrote it",
        "Checkpoint": read[0],
        **({"Compared with": read[1].removeprefix("against ")} if len(read) > 1 else {}),
        "Settings": ", ".join(f"{name} {value}" for name, value in settings.items()) or "none, all by default",
        "Sample": f"all {len(tensors)} router tensors, with {experts:,} expert biases"
        if tensors
        else "no router tensor",
    }


def _biases(tensor: RouterTensor) -> str:
    """Every bias of a router, sorted: a cast shows as steps and plateaus."""
    if tensor.kind != "expert_bias" or tensor.values is None or tensor.values.size < 2:
        return ""
    everything = [float(value) for value in tensor.values.astype("float64").ravel()]
    numbers = sorted(value for value in everything if math.isfinite(value))
    if not numbers:
        return ""
    shared = {value: times for value, times in Counter(numbers).items() if times > 1}
    most = sorted(shared, key=lambda value: -shared[value])
    named = ", ".join(f"{shared[value]} are {value:.9g}" for value in most[:_NAMED])
    more = f", and {len(most) - _NAMED} more values are shared" if len(most) > _NAMED else ""
    said = f"{len(numbers)} biases from {numbers[0]:.9g} to {numbers[-1]:.9g}; "
    said += f"{named}{more}." if shared else "no two are equal."
    if len(numbers) < len(everything):
        said += f" {len(everything) - len(numbers)} more are not finite, and are not drawn."
    apart = [math.nan if value in shared else value for value in numbers]
    equal = [value if value in shared else math.nan for value in numbers]
    lines = (
        Line("a value of its own", apart, "s1", marker="circle", width=0, digits=9),
        Line("shared by several", equal, "s3", marker="square", width=0, digits=9),
    )
    x = range(1, len(numbers) + 1)
    return Chart(tensor.name, said, said, "expert, by size of its bias", x, "expert_bias", lines).html()
