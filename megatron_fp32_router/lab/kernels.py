"""The arithmetic of TransformerEngine's kernels: those of its FusedAdam and of Megatron's clipping, and the router's.

In torch, after the formulas of version 2.20 in transformer_engine/common: multi_tensor/adam.cu, l2norm.cu, scale.cu;
fused_router/fused_topk_with_score_function.cu, fused_score_for_moe_aux_loss.cu, fused_moe_aux_loss.cu, utils.h;
gemm/cublaslt_gemm.cu. The checks before a kernel starts are those of pytorch/csrc/extensions.

All of them compute in fp32, whatever the tensors' dtypes. A GPU may differ in the order of a sum, in the rounding
between a product and a sum where its compiler fuses the two, and in which of equal scores it takes. A kernel takes the
dtype of a whole list from its first tensor; l2norm and scale do not check the other tensors, and neither do these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_fp32_router.gating.matmul import mm, tf32

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
    """The tensor's memory as bytes: as many elements of `dtype` as it has, or fewer where its storage ends before."""
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


def adam(chunk_size: int, noop_flag: torch.Tensor, tensor_lists: Lists, *hyper: Any) -> None:
    """One step of Adam. Lists: gradients, parameters, both moments, and main copies where there are any.

    `hyper`: the last parameters of `_moved`, in that order.
    """
    _check(tensor_lists, torch.float32)
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
    # Through double: torch's square root of fp32 is off by one unit for some numbers, a GPU's is not.
    root = (v / correction2).double().sqrt().float()
    update = (m / correction1) / (root + epsilon)
    if mode == 1:
        update = update + decay * p
    first.copy_(m)
    second.copy_(v)
    moved: torch.Tensor = p - lr * update
    return moved


def _check(tensor_lists: Lists, main: torch.dtype) -> None:
    """The checks of multi_tensor_adam_cuda and multi_tensor_adam_param_remainder_cuda."""
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
    """A quantized tensor that is still to be written."""
    return quantizer.create_tensor_from_data(torch.zeros(shape, dtype=torch.uint8))


# Matrix products ---------------------------------------------------------------------------------------------------


def gemm(
    a: torch.Tensor,
    transa: bool,
    b: torch.Tensor,
    transb: bool,
    out: torch.Tensor | None,
    quantizer: Any,
    out_type: Any,
    bias: torch.Tensor | None,
    *ignored: Any,
    **also_ignored: Any,
) -> tuple[torch.Tensor | None, ...]:
    """generic_gemm, without quantization, bias or accumulation: op(b) @ op(a), as cuBLAS stores matrices by column.

    Operands and result all in fp32 are multiplied in TF32 (CUBLAS_COMPUTE_32F_FAST_TF32 in cublaslt_gemm.cu).
    """
    if a.dtype != b.dtype:
        raise RuntimeError(f"Unable to find suitable cuBLAS GEMM algorithm: operands are {a.dtype} and {b.dtype}")
    if quantizer is not None or bias is not None or out is not None:
        raise NotImplementedError("the laboratory's gemm has no quantizer, bias or given output")
    # TransformerEngine's DType.kFloat32 is torch.float32.
    out_dtype = a.dtype if out_type is None else getattr(torch, out_type.name[1:].lower())
    operand = tf32 if a.dtype == out_dtype == torch.float32 else torch.Tensor.float
    a, b = operand(a), operand(b)
    return mm(b.t() if transb else b, a.t() if transa else a).to(out_dtype), None, None, None


# The fused router --------------------------------------------------------------------------------------------------

_EPSILON = 1e-20


def _scores(logits: torch.Tensor, function: str) -> torch.Tensor:
    if function == "softmax":
        return logits.float().softmax(dim=-1)
    if function != "sigmoid":
        raise NotImplementedError(f"the laboratory's fused router has no {function}")
    return 1 / (1 + (-logits.float()).exp())


def _largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest of each row; of equal ones the first."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count]


def _mask(like: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like, dtype=torch.bool).scatter_(-1, indices, True)


def fused_topk(
    logits: torch.Tensor,
    topk: int,
    use_pre_softmax: bool,
    num_groups: int | None,
    group_topk: int | None,
    scaling_factor: float | None,
    score_function: str,
    expert_bias: torch.Tensor | None,
    routing_map_format: int = 0,
    topk_indices: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities [T, E] in the dtype of the logits, bool routing map [T, E], and what backward needs, fp32."""
    if expert_bias is not None and score_function != "sigmoid":
        raise RuntimeError("score_function must be sigmoid or sqrtsoftplus when expert_bias is not None")
    if expert_bias is not None and expert_bias.dtype != torch.float32:
        raise RuntimeError("expert_bias must be a float32 tensor")
    if routing_map_format or topk_indices is not None:
        raise NotImplementedError("the laboratory's fused router gives a bool map only")
    softmax = score_function == "softmax"
    after = softmax and not use_pre_softmax
    first = logits.float() if after else _scores(logits, score_function)
    scores = first if expert_bias is None else first + expert_bias
    if group_topk and num_groups:
        grouped = scores.view(len(scores), num_groups, -1)
        best = grouped.gather(-1, _largest(grouped, topk // group_topk)).sum(-1)
        kept = _mask(best, _largest(best, group_topk)).unsqueeze(-1).expand_as(grouped)
        chosen = _largest(scores.masked_fill(~kept.reshape_as(scores), -torch.inf), topk)
    else:
        chosen = _largest(scores, topk)
    values = scores.gather(-1, chosen)
    if expert_bias is not None:
        # Not the score from before: bits that were rounded away when the bias was added are lost.
        values = values - expert_bias[chosen]
    if after:
        values = values.softmax(dim=-1)
        first = torch.full_like(first, -torch.inf).scatter_(-1, chosen, values)
    elif not softmax and topk > 1:
        values = values / (values.sum(dim=-1, keepdim=True) + _EPSILON)
    probs = torch.zeros_like(logits).scatter_(-1, chosen, ((scaling_factor or 1.0) * values).to(logits.dtype))
    return probs, _mask(scores, chosen), first


def fused_topk_backward(
    routing_map: torch.Tensor,
    saved: torch.Tensor,
    grad_probs: torch.Tensor,
    grad_logits: torch.Tensor,
    topk: int,
    use_pre_softmax: bool,
    scaling_factor: float | None,
    score_function: str,
    *ignored: Any,
) -> None:
    """Write the gradient of the logits into `grad_logits`."""
    grad = grad_probs.float() * (scaling_factor or 1.0)
    if score_function == "softmax":
        # -inf where no softmax was computed: its product with a zero gradient would not be zero.
        act = saved.masked_fill(~routing_map, 0) if not use_pre_softmax else saved
        grad = grad.masked_fill(~routing_map, 0)
        grad = act * (grad - (grad * act).sum(dim=-1, keepdim=True))
    else:
        if topk > 1:
            grad = _normalized(grad, saved, routing_map)
        grad = grad.masked_fill(~routing_map, 0) * saved * (1 - saved)
    grad_logits.copy_(grad)


def _normalized(grad: torch.Tensor, act: torch.Tensor, routed: torch.Tensor) -> torch.Tensor:
    """The gradient before a division by the sum over the routed experts."""
    total = act.masked_fill(~routed, 0).sum(dim=-1, keepdim=True) + _EPSILON
    moved = (grad * act).masked_fill(~routed, 0).sum(dim=-1, keepdim=True)
    return grad / total - moved / (total * total)


def fused_scores(
    logits: torch.Tensor, topk: int, score_function: str, routing_map_format: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores [T, E] in fp32, those of sigmoid normalised; routing map; what backward needs."""
    saved = _scores(logits, score_function)
    scores = saved if score_function == "softmax" else saved / (saved.sum(dim=-1, keepdim=True) + _EPSILON)
    return scores, _mask(scores, _largest(scores, topk)), saved


def fused_scores_backward(
    intermediate_output: torch.Tensor,
    grad_scores: torch.Tensor,
    grad_logits: torch.Tensor,
    topk: int,
    score_function: str,
) -> None:
    """Write the gradient of the logits into `grad_logits`."""
    act, grad = intermediate_output, grad_scores.float()
    if score_function == "softmax":
        grad = act * (grad - (grad * act).sum(dim=-1, keepdim=True))
    else:
        grad = _normalized(grad, act, torch.ones_like(act, dtype=torch.bool)) * act * (1 - act)
    grad_logits.copy_(grad)


def fused_aux_loss(
    probs: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    total_num_tokens: Any,
    num_experts: int,
    num_rows: int,
    num_cols: int,
    topk: int,
    coeff: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The auxiliary loss, in the dtype of the probabilities, and [coefficient, loss] in fp32 for backward."""
    if tokens_per_expert.dtype not in (torch.int16, torch.int32, torch.int64, torch.bfloat16, torch.float32):
        raise RuntimeError(f"Unsupported router index dtype {tokens_per_expert.dtype}")
    coefficient = num_experts * coeff / topk / float(total_num_tokens) ** 2
    loss = (probs.float().sum(dim=0) * tokens_per_expert.float()).sum() * coefficient
    return loss.to(probs.dtype), torch.stack([loss.new_tensor(coefficient), loss])


def fused_aux_loss_backward(
    Const_buf: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    num_rows: int,
    num_cols: int,
    grad_aux_loss: torch.Tensor,
) -> torch.Tensor:
    """The gradient of the probabilities."""
    row = Const_buf[0] * tokens_per_expert.float() * grad_aux_loss.float()
    return row.to(grad_aux_loss.dtype).expand(num_rows, num_cols).contiguous()
