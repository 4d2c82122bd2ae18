"""One split of a router's weight for all micro-batches of a step, and never a stale one.

What this saves can be counted. A split is five kernels that read and write 34 bytes for each element of the weight. The
product that uses it reads 2 bytes for each element of the tokens, and the 6 of the parts: with 256 experts and 4,096
tokens in a micro-batch, splitting each time would move 0.9 times as many bytes again, in forward and in backward.
Keeping the parts with each forward's graph instead would hold them once for every micro-batch in flight.

Nothing that torch can be asked tells whether a weight has changed: fused optimizers, NCCL and `.data` write through
the pointer, without a trace in `_version`. So a split is kept only where the weight cannot change: inside one call
of Megatron's own schedule, which runs all micro-batches of a step, forward and backward, and returns before the
optimizer, a parameter gather, a load or anything of the user's comes. (A gather that overlaps with the first
forward ends before the router that reads its weight runs.) When the call returns, what was kept is freed.
Everywhere else, in a schedule that the plugin does not know, in evaluation and inference outside of it, the weight
is split anew each time. An old split could still be found in two cases, which no known program has: a schedule inside
which a fused optimizer steps, and a thread that trains without a schedule while another thread is in one.

Backward takes what forward kept and keeps nothing itself: hooks on saved tensors (non-reentrant checkpointing,
save_on_cpu) hand it a new tensor object each time, and one split for each of those would be kept.

What is kept takes 6 bytes an element of every router weight of the model chunks on the device, until the step ends.

Inside a call, a change that shows in the tensor is still noticed: another storage, another `_version`. A CUDA graph
that captures one layer splits inside the graph, each time it is replayed; one that captures the whole schedule
splits once in it.
"""

from __future__ import annotations

import torch

from megatron_fp32_router.gating import schedule
from megatron_fp32_router.gating.split import split_weight


def parts_of(weight: torch.Tensor, *, keep: bool = True) -> torch.Tensor:
    """`split_weight(weight)`, made once in a step; kept for the rest of it if `keep`."""
    step = schedule.running[-1] if schedule.running else None
    # A bf16 weight is its own split.
    if step is None or weight.is_inference() or weight.dtype == torch.bfloat16:
        return split_weight(weight)
    stream = 0
    if weight.device.type == "cuda":
        if torch.cuda.is_current_stream_capturing() and not step.captured:
            # What a graph reads must be made in the graph: a replay would find this step's numbers.
            return split_weight(weight)
        # Another stream would have to wait for the one that makes the split.
        stream = torch.cuda.current_stream(weight.device).cuda_stream
    # The object as well as the address: sharded training lets layers take turns at one address.
    key = (id(weight), weight.data_ptr(), weight.device, weight.dtype, weight.shape, weight.stride(), stream)
    found = step.kept.get(key)
    if found is None or found[1] != weight._version:
        found = (weight, weight._version, split_weight(weight))
        if keep:
            step.kept[key] = found
    return found[2]
