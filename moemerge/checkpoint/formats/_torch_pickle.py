"""The pickle in a `.bin`: its description of tensors, read without running anything.

Python's own unpickler is never used. The few instructions that a state dict needs are followed
here, with the names in `_CALLS` and `_global`; they build dicts, tuples and descriptions of
tensors. What `torch.load(weights_only=True)` reads is understood. Python attributes of a tensor are
ignored.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moemerge.checkpoint.location import MAX_DIMENSIONS

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "uint16": "U16",
    "uint32": "U32", "uint64": "U64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
_TYPES = ("torch.Tensor", "torch.nn.parameter.Parameter")


@dataclass(frozen=True)
class Storage:
    """A storage of the zip: `count` values at `key`."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class Tensor:
    """A tensor in a storage, from value `start` on; a `negative` one has the other sign."""

    storage: Storage
    dtype: str
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    negative: bool


@dataclass(frozen=True)
class _Call:
    name: str


@dataclass(frozen=True)
class _Dtype:
    name: str


@dataclass(frozen=True)
class _Other:
    """A value that only a tensor's attributes may have: a type, a set, bytes."""


def unpickle(data: bytes) -> object:
    """Follow a pickle's instructions as far as a state dict needs them.

    Raises:
        ValueError: it holds what no state dict does; says what. A hostile pickle can raise
            anything.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[object, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in _VALUES:
            stack.append(_VALUES[name](argument))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = int(name[-1])
            stack[-size:] = [tuple(stack[-size:])]
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("APPEND", "APPENDS"):
            items = since_mark() if name == "APPENDS" else [stack.pop()]
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            for key, value in zip(items[::2], items[1::2], strict=True):
                if not isinstance(key, str | int | float | None):  # tuples of tuples hash for ever
                    raise ValueError("it holds a dict with a key that is not text")
                stack[-1][key] = value
        elif name == "STACK_GLOBAL":
            stack[-2:] = [_global(stack[-2], stack[-1])]
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            arguments, called = stack.pop(), stack.pop()
            if not isinstance(called, _Call):
                raise ValueError("its pickle calls what is no function")
            stack.append(_CALLS[called.name](*arguments))
        elif name == "BUILD":  # a state dict's own attributes, `_metadata`
            stack.pop()
            if not isinstance(stack[-1], dict):
                raise ValueError("its pickle gives a state to what is no dict")
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"its pickle uses {name}, which a state dict never needs")
    raise ValueError("its pickle has no end")


def _global(module: object, name: object) -> object:
    """A dtype for the name of a storage class, a function that may be called, or another name."""
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("its pickle asks for something without a name")
    full = f"{module}.{name}"
    if module == "torch" and name in _STORAGES:
        return _STORAGES[name]
    if full == "torch.storage.UntypedStorage":
        return _STORAGES["ByteStorage"]
    if module == "torch" and name in _DTYPES:
        return _Dtype(_DTYPES[name])
    if full in _TYPES:
        return _Other()
    if full not in _CALLS:
        raise ValueError(f"its pickle asks for {full}, which a state dict never needs")
    return _Call(full)


def _storage(reference: Any) -> Storage:
    kind, dtype, key, _device, count = reference
    if kind != "storage" or dtype not in _STORAGES.values() or not isinstance(key, str):
        raise ValueError("its pickle refers to something that is not a storage")
    if type(count) is not int:
        raise ValueError(f"storage {key!r} has no size")
    return Storage(key, dtype, count)


def _rebuild_tensor(
    storage: object,
    start: object,
    shape: object,
    stride: object,
    _grad: object = None,
    _hooks: object = None,
    metadata: object = None,
) -> Tensor:
    if not isinstance(storage, Storage):
        raise ValueError("its pickle describes a malformed tensor")
    return _tensor(storage, storage.dtype, start, shape, stride, metadata)


def _rebuild_tensor_v3(
    storage: object,
    start: object,
    shape: object,
    stride: object,
    _grad: object,
    _hooks: object,
    dtype: object,
    metadata: object = None,
) -> Tensor:
    """A tensor whose dtype has no storage class; its storage is bytes."""
    if not isinstance(storage, Storage) or not isinstance(dtype, _Dtype):
        raise ValueError("its pickle describes a malformed tensor")
    return _tensor(storage, dtype.name, start, shape, stride, metadata)


def _tensor(
    storage: Storage, dtype: str, start: object, shape: object, stride: object, metadata: object
) -> Tensor:
    marks = metadata or {}
    if not isinstance(marks, dict) or any(on for mark, on in marks.items() if mark != "neg"):
        raise ValueError("its pickle describes a tensor with marks that are not known")
    negative = bool(marks.get("neg"))
    if negative and not dtype.startswith(("F", "BF")):
        raise ValueError("its pickle describes negated numbers that are whole")
    if isinstance(shape, tuple) and isinstance(stride, tuple):
        numbers = (start, *shape, *stride)
        natural = all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        if natural and len(shape) == len(stride) <= MAX_DIMENSIONS:
            return Tensor(storage, dtype, start, shape, stride, negative)  # type: ignore[arg-type]
    raise ValueError("its pickle describes a malformed tensor")


def _rebuild_parameter(
    data: object, _grad: object = None, _hooks: object = None, state: object = None
) -> object:
    for attributes in state if isinstance(state, tuple) else (state,):
        if isinstance(attributes, dict) and "data" in attributes:
            raise ValueError("its pickle gives a tensor other data")
    return data


def _rebuild_from_type(call: object, _type: object, arguments: object, state: object) -> object:
    """A tensor with attributes; they are ignored."""
    if not isinstance(call, _Call) or not isinstance(arguments, tuple):
        raise ValueError("its pickle describes a malformed tensor")
    return _rebuild_parameter(_CALLS[call.name](*arguments), state=state)


def _from_other_device(data: object, dtype: object, *_: object) -> object:
    """A tensor of a TPU, as a tensor of the CPU."""
    if isinstance(data, Tensor) and dtype == _Dtype(data.dtype):
        return data
    raise ValueError("its pickle describes a tensor of one dtype that is to be another")


def _empty() -> dict[str, object]:
    return {}


def _other(*_: object) -> _Other:
    return _Other()


_CALLS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _from_other_device,
    "collections.OrderedDict": _empty,
    **dict.fromkeys(
        ("torch.Size", "torch.device", "builtins.set", "__builtin__.set", "_codecs.encode",
         "builtins.bytearray", "__builtin__.bytearray", "builtins.complex", "__builtin__.complex"),
        _other,
    ),
}  # fmt: skip

_VALUES: dict[str, Callable[[Any], object]] = {
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
        lambda argument: argument,
    ),
    "GLOBAL": lambda argument: _global(*argument.split(" ", 1)),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: {},
}
"""The instructions that put a value on the stack."""
