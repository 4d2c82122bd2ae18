"""Let a CPU pass for a CUDA device. ALL code that does so is in this file and in cpu_*.py, and nowhere else.

Megatron asks for CUDA devices, streams, generators and tensor types by name. On a machine without any, the
laboratory answers with the CPU, so that unmodified Megatron code runs. In a user's training that would be a
disaster. Therefore nothing happens at import, `pretend()` refuses where CUDA exists, only the laboratory calls it,
and `undo()` puts the identical original objects back.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
import wrapt

from megatron_fp32_router.lab import cpu_gloo
from megatron_fp32_router.lab.recipe import LabError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MISSING = object()
_replaced: list[tuple[Any, str, Any]] = []

#: torch functions that take `device=`. Megatron hands them "cuda" or torch.cuda.current_device().
_FACTORIES = [
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "empty_like",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randn",
    "randn_like",
    "randperm",
    "tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
    "zeros_like",
]


def is_pretending() -> bool:
    """Whether `pretend()` is in force."""
    return bool(_replaced)


def pretend() -> None:
    """Answer Megatron's questions about CUDA from the CPU, until `undo()`. Idempotent.

    Raises:
        LabError: there is a CUDA device.
    """
    if is_pretending():
        return
    if torch.cuda.is_available():
        raise LabError("refusing to pretend that the CPU is a CUDA device: this machine has a real one")
    # Its tables map torch.cuda's functions, one object to a name: fill them before ours are there. Megatron imports it.
    import_module("torch._dynamo")
    _devices()
    _streams()
    _random_numbers()
    _tensors()
    for owner, name, value in cpu_gloo.replacements():
        replace(owner, name, value)
    replace(torch, "compile", _compile_only_with_backend(torch.compile))
    wrapt.register_post_import_hook(_no_toolkit, "torch.utils.cpp_extension")


def _no_toolkit(module: Any) -> None:
    """Let what Megatron compiles for CUDA fail as with a torch built without CUDA, which Megatron is prepared for.

    A torch that was built for CUDA would look for the toolkit, and stop at the capability that `pretend` gives.
    """

    def load_inline(*args: Any, **kwargs: Any) -> None:
        raise OSError("the laboratory compiles nothing for CUDA")

    if is_pretending():
        replace(module, "load_inline", load_inline)


def undo() -> None:
    """Put every original back, newest first. What Megatron imported by name meanwhile keeps the replacement."""
    _undo_to(0)


def _undo_to(length: int) -> None:
    while len(_replaced) > length:
        owner, name, original = _replaced.pop()
        if original is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


@contextlib.contextmanager
def undone_after() -> Iterator[None]:
    """Undo, on leaving, every `replace` that was called inside."""
    start = len(_replaced)
    try:
        yield
    finally:
        _undo_to(start)


def replace(owner: Any, name: str, value: Any) -> None:
    """Put `value` in the place of an attribute, until `undo()`."""
    # vars() and not getattr(): an inherited attribute must be inherited again afterwards, not be copied.
    _replaced.append((owner, name, vars(owner).get(name, _MISSING)))
    setattr(owner, name, value)


def _nothing() -> Callable[..., None]:
    """A new function that does nothing. New each time: torch.compile's rule tables want one object per name."""

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    return nothing


# Devices ------------------------------------------------------------------------------------------------------


def _devices() -> None:
    cuda = torch.cuda
    # "cpu" and not 0: Megatron uses the answer as a device= argument, and newer code builds a torch.device of it.
    replace(cuda, "current_device", lambda: "cpu")
    replace(cuda, "device_count", lambda: 1)
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "_lazy_init"):
        replace(cuda, name, _nothing())
    replace(cuda, "get_device_capability", lambda device=None: (0, 0))
    replace(cuda, "is_current_stream_capturing", lambda: False)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        replace(cuda, name, lambda device=None: 0)  # a new function in each turn of the loop
    replace(cuda, "memory_stats", lambda device=None: {})
    mesh = import_module("torch.distributed.device_mesh").DeviceMesh
    from_group = mesh.from_group

    def on_cpu(group: Any, device_type: str, *args: Any, **kwargs: Any) -> Any:
        return from_group(group, _on_cpu(device_type), *args, **kwargs)

    replace(mesh, "from_group", staticmethod(on_cpu))


# Streams and events: a CPU runs in order, so all of them are no-ops ----------------------------------------------


class _Stream:
    """Stand in for torch.cuda.Stream. A class, because annotations and isinstance need one."""

    cuda_stream = 0
    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: object) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return _Event() if event is None else event


class _Event:
    """Stand in for torch.cuda.Event."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0


def _streams() -> None:
    only = _Stream()

    @contextlib.contextmanager
    def stream(stream: Any) -> Iterator[None]:
        yield

    replace(torch.cuda, "Stream", _Stream)
    replace(torch.cuda, "Event", _Event)
    replace(torch.cuda, "stream", stream)
    replace(torch.cuda, "current_stream", lambda device=None: only)
    replace(torch.cuda, "default_stream", lambda device=None: only)
    replace(torch.cuda, "set_stream", _nothing())


# Random numbers: the CUDA generator is the CPU's ----------------------------------------------------------------


class _Generators:
    """Stand in for torch.cuda.default_generators: whatever the index, the CPU's."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def _random_numbers() -> None:
    def get_rng_state(device: Any = "cuda") -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
        torch.set_rng_state(new_state)

    def manual_seed(seed: int) -> None:
        # Not torch.manual_seed: that one calls this one.
        torch.default_generator.manual_seed(int(seed))

    def initial_seed() -> int:
        return int(torch.default_generator.initial_seed())

    def call_now(callback: Callable[[], None], **kwargs: Any) -> None:
        # torch queues the call until CUDA starts, which is never: the random state would not be applied.
        callback()

    for owner in (torch.cuda, torch.cuda.random):
        replace(owner, "get_rng_state", get_rng_state)
        replace(owner, "set_rng_state", set_rng_state)
        replace(owner, "manual_seed", manual_seed)
        replace(owner, "initial_seed", initial_seed)
    # Megatron warns in each of its forks of the random state that the CPU's generator moved along with the GPU's: here
    # both are the same one.
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    warn = logger.warning

    def warning(message: object, *args: Any, **kwargs: Any) -> None:
        if message != "CPU RNG state changed within GPU RNG context":
            warn(message, *args, **kwargs)

    replace(logger, "warning", warning)
    replace(torch.cuda, "default_generators", _Generators())
    replace(torch.cuda, "_lazy_call", call_now)


# Tensors ----------------------------------------------------------------------------------------------------------


def _on_cpu(device: Any) -> Any:
    """Map a CUDA device, by whatever name, to the CPU; anything else passes."""
    if isinstance(device, torch.device):
        return torch.device("cpu") if device.type == "cuda" else device
    if isinstance(device, str):
        return "cpu" if device.startswith("cuda") else device
    # A bare number is a CUDA ordinal to torch.
    return "cpu" if isinstance(device, int) and not isinstance(device, bool) else device


def _with_device(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = _on_cpu(kwargs["device"])
        # There is no device that would read pinned memory.
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return call


def _tensors() -> None:
    for name in _FACTORIES:
        replace(torch, name, _with_device(getattr(torch, name)))
    for name in ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"):
        replace(torch.Tensor, name, _with_device(getattr(torch.Tensor, name)))
    real_to, real_type = torch.Tensor.to, torch.Tensor.type

    @functools.wraps(real_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Only devices and device names: a leading number or tensor means something else here.
        if args and isinstance(args[0], str | torch.device):
            args = (_on_cpu(args[0]), *args[1:])
        if kwargs.get("device") is not None:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return real_to(self, *args, **kwargs)

    @functools.wraps(real_type)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Megatron's optimizers sort parameters by this string.
        if dtype is None:
            return str(real_type(self)).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return real_type(self, dtype, *args, **kwargs)

    def itself(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    replace(torch.Tensor, "to", to)
    replace(torch.Tensor, "type", type_)
    replace(torch.Tensor, "cuda", itself)
    replace(torch.Tensor, "record_stream", _nothing())
    replace(torch.nn.Module, "cuda", itself)


def _compile_only_with_backend(real: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile that returns the function as it is unless the caller names a backend.

    Megatron's jit_fuser is torch.compile, whose default backend needs a C++ toolchain.
    """

    @functools.wraps(real)
    def compile(model: Any = None, *, backend: Any = None, **kwargs: Any) -> Any:
        if backend is not None:
            return real(model, backend=backend, **kwargs)
        return functools.partial(compile, **kwargs) if model is None else model

    return compile


# CPU offload: a second memory -------------------------------------------------------------------------------------


class _Host(torch.Tensor):
    """A tensor in host memory; what is computed from it is one too."""


@contextlib.contextmanager
def offloading() -> Iterator[None]:
    """Let HybridDeviceOptimizer split its parameters between the pretended GPU and the host, while this is open.

    It asks tensors where they are only while it splits them; afterwards they are plain tensors again.
    """
    hybrid = import_module("megatron.core.optimizer.cpu_offloading.hybrid_optimizer").HybridDeviceOptimizer
    real = hybrid._get_sub_optimizer_param_groups

    @functools.wraps(real)
    def split(self: Any, *args: Any) -> Any:
        with undone_after():
            replace(torch.Tensor, "is_cuda", property(lambda tensor: not isinstance(tensor, _Host)))
            replace(torch.Tensor, "cpu", lambda tensor: tensor.as_subclass(_Host))
            replace(torch.Tensor, "pin_memory", lambda tensor: tensor)
            groups = real(self, *args)
        for group in groups[0]:
            for param in group["params"]:
                param.__class__ = torch.Tensor
        return groups

    with undone_after():
        replace(hybrid, "_get_sub_optimizer_param_groups", split)
        yield
