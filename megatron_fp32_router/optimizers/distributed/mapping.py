"""Where the state of each parameter lies in a checkpoint that stores it by gradient buffer, with the plugin on or off.

A model chunk has one gradient buffer for each dtype. Whether router parameters are fp32 decides in which buffer they
lie, and so where all later parameters lie. The layout with the plugin's other setting is computed here, from the same
parameters in the same order, as Megatron computes its own. It is used only if the same computation gives the buffers
that this run really has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from megatron_fp32_router.casts.router import below_fp32, is_router

Dtypes: TypeAlias = tuple[torch.dtype, torch.dtype]

#: Megatron pads the start of a parameter to a multiple of the first number, and the end of a bucket to one of the
#: second and of the ranks. With --ddp-pad-buckets-for-high-nccl-busbw that is a multiple of the third too.
_START, _END, _END_FOR_BUSBW = 64, 128, 2**16


@dataclass(frozen=True)
class Bucket:
    """A bucket of a gradient buffer.

    Attributes:
        numel: its elements, without the padding at its end.
        starts: parameter -> where it starts in the bucket.
    """

    numel: int
    starts: dict[Any, int]


@dataclass(frozen=True)
class Buffer:
    """A gradient buffer: the dtypes of its parameters and of its gradients, and its buckets."""

    dtypes: Dtypes
    buckets: tuple[Bucket, ...]

    @property
    def numel(self) -> int:
        """Elements of all buckets, without the padding at their ends: of a tensor in a gathered format."""
        return sum(bucket.numel for bucket in self.buckets)

    def places(self) -> Iterator[tuple[Any, int]]:
        """(parameter, where it starts in a gathered tensor) of every parameter."""
        offset = 0
        for bucket in self.buckets:
            yield from ((parameter, offset + start) for parameter, start in bucket.starts.items())
            offset += bucket.numel


#: The gradient buffers of a distributed optimizer, in its order.
Layout: TypeAlias = tuple[Buffer, ...]


def present(optimizer: Any) -> Layout:
    """The buffers that this distributed optimizer has."""

    def bucket(buffer: Any, number: int) -> Bucket:
        found, places = buffer.buckets[number], buffer.param_index_map.items()
        starts = {parameter: start - found.offset for parameter, (start, _, place) in places if place == number}
        return Bucket(found.numel_unpadded, starts)

    return tuple(
        Buffer(_dtypes(buffer), tuple(bucket(buffer, number) for number in range(len(buffer.buckets))))
        for buffer in optimizer.buffers
    )


def flipped(optimizer: Any) -> dict[Any, Dtypes]:
    """Router parameter -> dtypes of the buffer that it would lie in with the plugin's other setting."""
    here = {parameter for buffer in optimizer.buffers for parameter in buffer.params}
    result: dict[Any, Dtypes] = {}
    if not (optimizer.config.bf16 or optimizer.config.fp16):
        return result
    low = torch.bfloat16 if optimizer.config.bf16 else torch.float16
    for chunk in optimizer.model_chunks:
        for parameter in (p for module in chunk.modules() if is_router(module) for p in module.parameters()):
            dtype = torch.float32 if below_fp32(parameter.dtype) else low
            # What Megatron itself keeps in fp32 is fp32 with either.
            if parameter in here and not getattr(parameter, "keep_in_fp32", False):
                result[parameter] = (dtype, torch.float32 if optimizer.ddp_config.grad_reduce_in_fp32 else dtype)
    return result


def other(optimizer: Any) -> Layout | None:
    """The buffers that it would have with the plugin's other setting.

    None where Megatron lays buffers out in a way that is not known here: then the computation does not give the buffers
    that it has.
    """
    now = {parameter: _dtypes(buffer) for buffer in optimizer.buffers for parameter in buffer.params}
    if _computed(optimizer, now) != present(optimizer):
        return None
    return _computed(optimizer, now | flipped(optimizer))


def _dtypes(buffer: Any) -> Dtypes:
    return buffer.param_dtype, buffer.grad_dtype


def _computed(optimizer: Any, dtypes: dict[Any, Dtypes]) -> Layout:
    """The buffers that Megatron makes of parameters with those dtypes, chunk by chunk: one for each, in their order."""
    layout = []
    for chunk, buffers in zip(optimizer.model_chunks, optimizer.per_model_buffers.values(), strict=False):
        here = {parameter for buffer in buffers for parameter in buffer.params}
        grouped: dict[Dtypes, list[Any]] = {}
        for parameter in chunk.parameters():
            if parameter in here:
                grouped.setdefault(dtypes[parameter], []).append(parameter)
        for key, parameters in grouped.items():
            ranks = buffers[0].data_parallel_group.size()
            layout.append(Buffer(key, tuple(_buckets(parameters, chunk.bucket_size, ranks, optimizer.ddp_config))))
    return tuple(layout)


def _buckets(parameters: list[Any], size: int | None, ranks: int, config: Any) -> Iterator[Bucket]:
    """How _ParamAndGradBuffer, and from 0.18 on DistributedOptimizer, cuts a buffer: from the last parameter on."""
    for_busbw = getattr(config, "pad_buckets_for_high_nccl_busbw", False)
    divisor = math.lcm(ranks, _END, _END_FOR_BUSBW if for_busbw else 1)
    first = end = 0  # of the bucket, of what lies in it
    starts: dict[Any, int] = {}
    for parameter in reversed(parameters):
        start = math.ceil(end / _START) * _START
        # A shared embedding has a bucket of its own, so that both pipeline stages cut it alike.
        alone = getattr(parameter, "shared_embedding", False)
        if alone and starts:
            yield Bucket(start - first, starts)
            first = start = math.ceil(start / divisor) * divisor
            starts = {}
        starts[parameter], end = start - first, start + parameter.numel()
        if alone or (size is not None and end - first >= size):
            yield Bucket(end - first, starts)
            first = end = math.ceil(end / divisor) * divisor
            starts = {}
    if starts:
        yield Bucket(end - first, starts)


# What a checkpoint has, to compare and to say, and how it is laid out anew -------------------------------------------
#
# Buffers and buckets are named as in Megatron's keys: "gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0".


def gathered(layout: Layout) -> dict[str, int]:
    """Buffer -> elements of its tensors, where a format gathers them: the legacy one, and dp_zero_gather_scatter."""
    return {_name(index, buffer): buffer.numel for index, buffer in enumerate(layout)}


def saved_gathered(state: dict[Any, Any]) -> dict[str, int]:
    """The same of what a checkpoint holds. Keys that are no numbers are Megatron's notes."""
    return {
        f"gbuf_idx_{index}.dtype_{dtypes}": tensors["numel_unpadded"]
        for index in sorted(index for index in state if isinstance(index, int))
        for dtypes, tensors in state[index].items()
    }


def gathered_anew(state: dict[Any, Any], there: Layout, here: Layout) -> dict[Any, Any]:
    """What a checkpoint holds in the layout `there`, in the layout `here`. Tensors, which are large, leave `state`."""
    home = {parameter: (index, place) for index, buffer in enumerate(there) for parameter, place in buffer.places()}
    result = {key: value for key, value in state.items() if not isinstance(key, int)}
    result |= {index: {buffer.dtypes: {"numel_unpadded": buffer.numel}} for index, buffer in enumerate(here)}
    tensors = state[0][there[0].dtypes]
    for name in [name for name, value in tensors.items() if isinstance(value, torch.Tensor)]:
        saved = [state[index][buffer.dtypes].pop(name) for index, buffer in enumerate(there)]
        for index, buffer in enumerate(here):
            tensor = saved[0].new_zeros(buffer.numel)
            for parameter, place in buffer.places():
                source, start = home[parameter]
                tensor[place : place + parameter.numel()] = saved[source][start : start + parameter.numel()]
            result[index][buffer.dtypes][name] = tensor
    return result


class Request(dict[Any, Any]):
    """What a distributed optimizer asks of a checkpoint in the format dp_reshardable, and which one asks."""

    optimizer: Any = None

    @property
    def prefix(self) -> str:
        """What the keys of this optimizer's state begin with, before its buffer."""
        key: str = self["per_bucket_numel"].key
        return key.removesuffix("per_bucket_numel")

    def slices(self) -> Iterator[tuple[tuple[Any, ...], Any, slice, dict[str, Any]]]:
        """(where, parameter, the part of it that this rank owns, what is asked for it)."""
        for index, buffers in enumerate(self.optimizer.gbuf_ranges):
            for dtypes, buckets in buffers.items():
                for number, bucket in enumerate(buckets):
                    asked = [tensors for tensors in self[index][dtypes][number] if not tensors["padding"].unwrap()]
                    for place, (parameter, ranges) in enumerate(bucket["param_map"].items()):
                        part = slice(ranges["param"].start, ranges["param"].end)
                        yield (index, dtypes, number, place), parameter, part, asked[place]


def cut(layout: Layout) -> dict[str, int]:
    """Bucket -> its elements, where a format keeps buckets apart: dp_reshardable."""
    return {
        _name(index, buffer, number): bucket.numel
        for index, buffer in enumerate(layout)
        for number, bucket in enumerate(buffer.buckets)
    }


def saved_cut(prefix: str, saved: dict[str, Any]) -> dict[str, int]:
    """The same of what a checkpoint's metadata names with that prefix."""
    names = re.compile(re.escape(prefix) + r"(gbuf_idx_.*)\.param")
    found = {match[1]: saved[key].global_shape[0] for key in saved if (match := names.fullmatch(key))}
    return dict(sorted(found.items()))


def asked_anew(request: Request, there: Layout, saved: dict[str, Any]) -> Request:
    """The same request, of a checkpoint that has the layout `there`.

    Each rank reads the slices that it owns now, wherever they lie: ranks exchange nothing. Padding is not read.
    """
    home = {
        parameter: (_name(index, buffer, number), bucket.numel, start)
        for index, buffer in enumerate(there)
        for number, bucket in enumerate(buffer.buckets)
        for parameter, start in bucket.starts.items()
    }
    result = Request({key: value for key, value in request.items() if not isinstance(key, int)})
    result.optimizer = request.optimizer
    for index, buffers in enumerate(request.optimizer.gbuf_ranges):
        result[index] = {dtypes: [[] for _ in buckets] for dtypes, buckets in buffers.items()}
    moved = flipped(request.optimizer)
    for (index, dtypes, number, _), parameter, part, asked in request.slices():
        name, numel, start = home[parameter]
        tensors = dict(asked)
        for kind, entry in asked.items():
            if not hasattr(entry, "global_offset"):
                continue
            key, data = f"{request.prefix}{name}.{kind}", entry.data
            stored = saved[key].dtype if key in saved else data.dtype
            if stored.is_floating_point != data.dtype.is_floating_point:
                data = torch.empty_like(data, dtype=stored)
            elif kind == "param" and parameter in moved:
                # The model's entry, which is rounded, is read into the memory of an fp32 parameter; this one elsewhere.
                data = torch.empty_like(data)
            tensors[kind] = replace(
                entry, key=key, data=data, dtype=data.dtype, global_shape=(numel,), global_offset=(start + part.start,)
            )
        result[index][dtypes][number].append(tensors)
    return result


def _name(index: int, buffer: Buffer, number: int | None = None) -> str:
    return f"gbuf_idx_{index}.dtype_{buffer.dtypes}" + ("" if number is None else f".bucket_idx_{number}")
