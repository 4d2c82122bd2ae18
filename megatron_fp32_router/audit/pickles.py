"""Pickles read as data: nothing is imported, nothing is called that is not in this file.

DCP's `.metadata`, and `data.pkl` inside each of torch's archives, are pickles. Python's own advice is to override
`find_class`. Here it returns a stand-in for every name: names of the allow-list have a meaning (a dtype, a storage, how
a tensor lies in it), and every other name becomes a class that keeps its name and state and does nothing.

The unpickler is the standard library's one in pure Python. The one in C allocates 16 bytes for every memo slot below
the highest index that a file names: five bytes of a file could take tens of gigabytes. Opcodes that no checkpoint needs
are refused.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any, ClassVar, Final

import ml_dtypes
import numpy as np

from megatron_fp32_router.audit.files import shown
from megatron_fp32_router.errors import CheckpointUnreadableError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Opaque:
    """Stands for an instance of a class that was not imported. `state`: what its pickle says it holds."""

    #: "module.Class", as the pickle names it.
    of: str = ""
    state: Any = None

    def __new__(cls, *args: Any) -> Opaque:
        """Drop the arguments. object.__init__ drops them too, since this takes them."""
        return super().__new__(cls)

    def __setitem__(self, key: Any, value: Any) -> None:
        """A subclass of dict would keep the item; here it is dropped."""

    def append(self, value: Any) -> None:
        """A subclass of list or set would keep what it is given; here it is dropped."""

    add = extend = append

    def field(self, name: str) -> Any:
        """A field of its state, or None."""
        return self.state.get(name) if isinstance(self.state, dict) else None


@dataclass(frozen=True)
class Dtype:
    """A torch dtype by name, "bfloat16": one of NUMPY_DTYPES."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A run of elements in an archive: record `data/{key}`, `numel` elements of `dtype`."""

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """Where a tensor lies in its storage; `offset` and `stride` count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.storage.dtype


#: Every dtype that a router's tensor may have on disk, by torch's name.
NUMPY_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    name: np.dtype(getattr(ml_dtypes, name, None) or name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
        "int64", "int32", "int16", "int8", "uint8", "bool",
    )
}  # fmt: skip

_STORAGES: Final = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "UntypedStorage": "uint8",
}  # fmt: skip

_MAX_NDIM = 8

_OPCODES_PER_TICK: Final = 1 << 16


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0 or value >= 1 << 62:
        raise pickle.UnpicklingError(f"expected a size, found {shown(value)}")
    return value


def _naturals(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or len(values) > _MAX_NDIM:
        raise pickle.UnpicklingError(f"expected at most {_MAX_NDIM} sizes, found {shown(values)}")
    return tuple(_natural(value) for value in values)


def _rebuild_v2(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> TensorRef:
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError(f"expected a storage below a tensor, found {shown(storage)}")
    shape, stride = _naturals(shape), _naturals(stride)
    if len(shape) != len(stride):
        raise pickle.UnpicklingError("a tensor's shape and stride differ in length")
    return TensorRef(storage, _natural(offset), shape, stride)


def _rebuild_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> TensorRef:
    if not isinstance(dtype, Dtype):
        raise pickle.UnpicklingError("expected a dtype")
    if isinstance(storage, Storage):
        # An untyped storage counts bytes.
        size = storage.numel * NUMPY_DTYPES[storage.dtype].itemsize
        storage = Storage(storage.key, dtype.name, size // NUMPY_DTYPES[dtype.name].itemsize)
    return _rebuild_v2(storage, offset, shape, stride)


def _rebuild_type(function: Any, kind: Any, args: Any, *rest: Any) -> Any:
    if not isinstance(function, FunctionType) or not isinstance(args, tuple):
        raise pickle.UnpicklingError("expected one of torch's rebuild functions")
    return function(*args)


def _size(*args: Any) -> tuple[int, ...]:
    return _naturals(args[0]) if len(args) == 1 and isinstance(args[0], tuple | list) else _naturals(args)


class _Ordered(dict[Any, Any]):
    """Stands for an OrderedDict. torch's state dicts give theirs attributes, which are dropped here."""

    def __init__(self, *args: Any) -> None:
        super().__init__()
        if args:
            raise pickle.UnpicklingError("an OrderedDict with arguments, as no protocol since 2 writes it")


_ALLOWED: Final[dict[tuple[str, str], Any]] = {
    ("collections", "OrderedDict"): _Ordered,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *rest: tensor,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *rest: tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_type,
    **{("torch", name): Dtype(name) for name in NUMPY_DTYPES},
    **{("torch", name): Dtype(dtype) for name, dtype in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): Dtype("uint8"),
}

_REFUSED_OPCODES: Final = (
    pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.PERSID,
    pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER,
)  # fmt: skip


def _check_key(key: Any) -> None:
    """Refuse keys whose hash takes long, or which could be chosen so that all have the same hash.

    The hash of nested tuples can take for ever. Integers below 2^61 - 1 are their own hash. Larger ones, and large ones
    in tuples, can be chosen to collide, and n keys that collide take n^2 steps.
    """
    parts = key if isinstance(key, tuple) and len(key) <= _MAX_KEY_PARTS else (key,)
    limit = 1 << (31 if isinstance(key, tuple) else 60)
    for part in parts:
        if not isinstance(part, _PLAIN_KEYS) or (isinstance(part, int) and not -limit < part < limit):
            raise pickle.UnpicklingError(f"a key of a kind that no checkpoint has: {shown(key)}")


_PLAIN_KEYS: Final = (str, bytes, int, float, bool, type(None), Dtype, Opaque)

#: Megatron's longest keys are tuples of two: the dtypes of a buffer.
_MAX_KEY_PARTS: Final = 16


class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, data: bytes) -> None:
        file = io.BytesIO(data)
        super().__init__(file)
        self._classes: dict[tuple[str, str], type[Opaque]] = {}
        # Read the bytes directly. Frames only say how much to read ahead, and following them takes a fifth of the time.
        self.read, self.readline = file.read, file.readline
        self.metastack: list[Any] = []
        self.stack: list[Any] = []
        self.append = self.stack.append

    def run(self, tick: Callable[[], None]) -> Any:
        """The object that the pickle makes. `tick` is called every 65,536 opcodes."""
        read, dispatch = self.read, self.dispatch
        try:
            while True:
                tick()
                for _ in range(_OPCODES_PER_TICK):
                    key = read(1)
                    if not key:
                        raise EOFError("the pickle ends before its end")
                    dispatch[key[0]](self)
        except pickle._Stop as done:  # type: ignore[attr-defined]
            return done.value

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in; never an import."""
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if (module, name) not in self._classes:
            self._classes[module, name] = type("Opaque", (Opaque,), {"of": f"{module}.{name}"})
        return self._classes[module, name]

    def persistent_load(self, saved: Any) -> Any:
        """("storage", type, key, location, number of elements), as torch.save writes it."""
        if not isinstance(saved, tuple) or len(saved) != 5 or saved[0] != "storage":
            raise pickle.UnpicklingError(f"expected a storage, found {shown(saved)}")
        kind, key = saved[1], saved[2]
        if not isinstance(kind, Dtype) or not isinstance(key, str):
            # A storage of a kind that routers do not have (quantised, complex): taken for bytes.
            kind, key = Dtype("uint8"), key if isinstance(key, str) else shown(key)
        return Storage(key, kind.name, _natural(saved[4]))


def _checked(opcode: bytes, keys: slice) -> Callable[[Any], None]:
    """The library's function for an opcode, after a check of the keys that it hashes: those in `keys` of the stack."""
    original = pickle._Unpickler.dispatch[opcode[0]]

    def checked(self: Any) -> None:
        for key in self.stack[keys]:
            _check_key(key)
        original(self)

    return checked


def _load_build(self: Any) -> None:
    """Give state to stand-ins only: a pickle must not change the objects of this file."""
    state = self.stack.pop()
    if isinstance(self.stack[-1], Opaque):
        self.stack[-1].state = state
    elif not isinstance(self.stack[-1], _Ordered):
        raise pickle.UnpicklingError(f"state for a {type(self.stack[-1]).__name__}")


def _load_put(self: Any) -> None:
    """Bound the index: the memo is a dictionary, and this opcode may name any integer as a key (`_check_key`)."""
    index = int(self.readline()[:-1])
    if not 0 <= index < 1 << 31:
        raise pickle.UnpicklingError("a memo index that no checkpoint has")
    self.memo[index] = self.stack[-1]


def _load_frame(self: Any) -> None:
    self.read(8)


_Unpickler.dispatch |= {
    pickle.BUILD[0]: _load_build,
    pickle.FRAME[0]: _load_frame,
    pickle.PUT[0]: _load_put,
    pickle.SETITEM[0]: _checked(pickle.SETITEM, slice(-2, -1)),
    pickle.SETITEMS[0]: _checked(pickle.SETITEMS, slice(None, None, 2)),
    pickle.DICT[0]: _checked(pickle.DICT, slice(None, None, 2)),
    pickle.ADDITEMS[0]: _checked(pickle.ADDITEMS, slice(None)),
    pickle.FROZENSET[0]: _checked(pickle.FROZENSET, slice(None)),
}
for _opcode in _REFUSED_OPCODES:
    del _Unpickler.dispatch[_opcode[0]]


def load(data: bytes, path: Path, what: str, tick: Callable[[], None] = lambda: None) -> Any:
    """The object graph of a pickle, made of plain values and the stand-ins of this file.

    `tick` is called now and then: 20 MB take about six seconds.

    Raises:
        CheckpointUnreadableError: not a pickle, truncated, garbled, or asking for what is refused.
    """
    try:
        return _Unpickler(data).run(tick)
    except KeyError as error:
        code = error.args[0] if error.args else None
        known = isinstance(code, int) and code in pickle._Unpickler.dispatch
        said = "an opcode that is refused" if known else "something that is no pickle"
        raise CheckpointUnreadableError(f"{path}: expected {what}, found {said} ({error!r})") from error
    except Exception as error:
        # A garbled pickle can lead to every kind of error, and none may end as a traceback.
        raise CheckpointUnreadableError(
            f"{path}: {what} is truncated or garbled: {type(error).__name__}: {str(error)[:200]}"
        ) from error
