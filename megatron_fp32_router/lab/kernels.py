"""The arithmetic of TransformerEngine's multi-tensor kernels, which its FusedAdam and Megatron's clipping call.

In torch, after the formulas of transformer_engine/common/multi_tensor (adam.cu, l2norm.cu, scale.cu) of version 2.20.
All of them compute in fp32 whatever the tensors' types. What a GPU may do otherwise is the order of a sum, and the
rounding between a product and a sum, where its compiler fuses the two. Kernels take the type of a whole list from its
first tensor; l2norm and scale do not look at the others', and neither do these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Lists = Sequence[Sequence[torch.Tensor]]


def l2norm(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: Lists, per_tensor: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm of all [1], norm of each [tensors] or [0]); `noop_flag` becomes 1 where a sum is not finite."""
    (tensors,) = tensor_lists
    squares = torch.stack([_read(tensor, tensors[0].dtype).float().square().sum() for tensor in tensors])
    if not bool(squares.isfinite().all()):
        noop_flag.fill_(1)
    return squares.sum().sqrt().view(1), squares.sqrt() if per_tensor else squares.new_empty(0)


def scale(chunk_size: int, noop_flag: torch.Tensor, tensor_lists: Lists, factor: Any) -> None:
    """The second list becomes the first times `factor`, a number or a tensor of one."""
    sources, targets = tensor_lists
    for source, target in zip(sources, targets, strict=True):
        values = _read(source, sources[0].dtype).float()
        if not bool(values.isfinite().all()):
            noop_flag.fill_(1)
        _write(target, (values * factor).to(targets[0].dtype))


def _memory(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bytes from a tensor's first element on that so many elements of `dtype` take, as far as there are any."""
    storage, start = tensor.untyped_storage(), tensor.storage_offset() * tensor.element_size()
    length = min(tensor.numel() * dtype.itemsize, storage.nbytes() - start)
    return torch.empty(0, dtype=torch.uint8).set_(storage, start, (length - length % dtype.itemsize,), (1,))


def _read(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if tensor.dtype == dtype else _memory(tensor, dtype).clone().view(dtype)


def _write(tensor: torch.Tensor, values: torch.Tensor) -> None:
    if tensor.dtype == values.dtype:
        tensor.copy_(values)
    else:
        _memory(tensor, values.dtype).copy_(values.reshape(-1).view(torch.uint8))


def adam(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """One step of Adam. Lists: gradients, parameters, both moments, and main copies where there are any."""
    _check(tensor_lists, torch.float32)
    hyper = (lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay)
    for grad, param, first, second, *main in zip(*tensor_lists, strict=True):
        moved = _moved(main[0] if main else param, grad, first, second, *hyper)
        for target in (param, *main):
            target.copy_(moved)


def adam_param_remainder(chunk_size: int, noop_flag: torch.Tensor, tensor_lists: Lists, *hyper: Any) -> None:
    """adam for bf16 parameters whose fp32 main copy is the parameter's 16 bits and 16 more, an int16 "remainder".

    A parameter is the main copy rounded to nearest: one above the main copy's upper half where the lower is negative.
    """
    _check(tensor_lists, torch.int16)
    for grad, param, first, second, rest in zip(*tensor_lists, strict=True):
        upper = param.view(torch.int16) - (rest < 0).to(torch.int16)
        main = ((upper.int() << 16) | (rest.int() & 0xFFFF)).view(torch.float32)
        bits = _moved(main, grad, first, second, *hyper).view(torch.int32)
        rest.copy_(((bits & 0xFFFF) ^ 0x8000) - 0x8000)
        param.view(torch.int16).copy_((bits >> 16) + (rest < 0))


def _moved(
    param: torch.Tensor,
    grad: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> torch.Tensor:
    """The parameter in fp32 after the step; both moments are updated in place."""
    # The kernel's arguments are floats; corrections are computed in double and stored as float.
    lr, beta1, beta2, epsilon, decay = torch.tensor([lr, beta1, beta2, epsilon, weight_decay]).tolist()
    corrections = [1 - beta1**step, 1 - beta2**step] if bias_correction else [1.0, 1.0]
    correction1, correction2 = torch.tensor(corrections).tolist()
    rest1, rest2 = (1 - torch.tensor([beta1, beta2])).tolist()
    p, g = param.float(), grad.float()
    if mode == 0:
        g = g + decay * p
    m = beta1 * first.float() + rest1 * g
    v = beta2 * second.float() + rest2 * g * g
    # Through double: torch's own root of floats is off by one unit for some of them, a GPU's is not.
    root = (v / correction2).double().sqrt().float()
    update = (m / correction1) / (root + epsilon)
    if mode == 1:
        update = update + decay * p
    first.copy_(m)
    second.copy_(v)
    moved: torch.Tensor = p - lr * update
    return moved


def _check(tensor_lists: Lists, main: torch.dtype) -> None:
    """What multi_tensor_adam_cuda and its sister check before they start."""
    grads, params, firsts, seconds, *mains = tensor_lists
    moments = {(first.dtype, second.dtype) for first, second in zip(firsts, seconds, strict=True)}
    if len({grad.dtype for grad in grads}) != 1 or len({param.dtype for param in params}) != 1:
        raise RuntimeError("gradients, and parameters, must have one dtype each in one call of multi_tensor_adam")
    if moments not in ({(torch.float32,) * 2}, {(torch.bfloat16,) * 2}):
        raise RuntimeError(f"first and second moments must both be Float32 or both be BFloat16, but are {moments}")
    if any(copy.dtype != main for copies in mains for copy in copies):
        raise RuntimeError(f"main copies must be {main}")


def quantize(source: torch.Tensor, quantizer: Any, target: Any = None, noop_flag: Any = None) -> Any:
    """A Float8Quantizer's cast to e4m3 with one scale for the tensor: saturating, rounding to nearest even."""
    target = empty_quantized(quantizer, list(source.shape)) if target is None else target
    quantizer.amax.copy_(source.abs().max())
    values = (source.float() * quantizer.scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    target._data.copy_(values.view(torch.uint8))
    target._scale_inv.copy_(1 / quantizer.scale)
    return target


def empty_quantized(quantizer: Any, shape: list[int], *ignored: Any) -> Any:
    """A quantized tensor whose content nobody has written."""
    return quantizer.create_tensor_from_data(torch.zeros(shape, dtype=torch.uint8))
