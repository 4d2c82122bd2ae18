"""Norms and clipping of gradients in several dtypes.

An fp32 router's gradients are fp32 and its neighbours' may be bf16. Megatron hands all of them to the kernels of
TransformerEngine or apex in one call, and those take the first tensor's type for that of all: they read bf16 memory
as fp32, past its end (NVIDIA/Megatron-LM #7338). Here there is one call for each dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_fp32_router.patching.registry import replaces


def one_call_a_dtype(original: Callable[..., Any]) -> Callable[..., Any]:
    """multi_tensor_applier, as clip_grads calls it: with one list of gradients for their norm, with two to scale them.

    Tensors of one dtype go through as they came. No host synchronisation: norms are joined on the device.
    """

    @replaces(original)
    def multi_tensor_applier(op: Any, noop_flag_buffer: Any, tensor_lists: Any, *args: Any) -> Any:
        dtypes = {tensor.dtype for tensors in tensor_lists for tensor in tensors}
        if len(dtypes) < 2:
            return original(op, noop_flag_buffer, tensor_lists, *args)
        results = []
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensor_lists[0]):
            places = [place for place, tensor in enumerate(tensor_lists[0]) if tensor.dtype == dtype]
            alike = [[tensors[place] for place in places] for tensors in tensor_lists]
            results.append(original(op, noop_flag_buffer, alike, *args))
        # A scaling returns nothing, and so does TransformerEngine's applier where no tensor has an element.
        norms = [result[0] for result in results if result is not None]
        return (torch.linalg.vector_norm(torch.cat(norms), keepdim=True), None) if norms else None

    return multi_tensor_applier
