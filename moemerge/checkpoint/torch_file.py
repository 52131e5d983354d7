"""A `.bin` shard's tensors, located without torch and without running anything it holds.

`torch.save` writes an uncompressed zip: `data.pkl` describes the tensors, `data/KEY` holds each
storage's bytes. Python's own unpickler is never used: the few instructions that a state dict needs
are followed here, with the names in `_CALLS` and `_global`, and build dicts, tuples and
descriptions of tensors; what they yield is checked like a safetensors header. What is read is what
`torch.load(weights_only=True)` reads; the Python attributes of a tensor are passed over.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moemerge.checkpoint.remote import HubError
from moemerge.checkpoint.tensors import ITEMSIZE, MAX_DIMENSIONS, Location

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

MAX_PICKLE_BYTES = 10_000_000
"""Ten times what the largest model's shard needs; bounds memory and time."""


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
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
    """What only a tensor's attributes may be: a type, a set, bytes."""


def read_header(path: Path, remote: BinaryIO | None = None) -> dict[str, Location]:
    """The tensors of a `.bin` file by name.

    With `remote`, the file is read there and `path` is where it will be; offsets are then left at
    0, for a zip states each beside its data, which would cost a request a tensor.

    Raises:
        ValueError: the file is not a zip of `torch.save`, or holds what is not a plain tensor.
        OSError: the file cannot be read.
    """
    try:
        return _read_zip(path, remote)
    except (ValueError, OSError, HubError):
        raise
    except Exception as error:  # a hostile zip or pickle can raise anything
        raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from error


def _read_zip(path: Path, remote: BinaryIO | None) -> dict[str, Location]:
    if remote is None:
        path.open("rb").close()  # is_zipfile takes what cannot be read for no zip
    if not zipfile.is_zipfile(remote or path):
        raise ValueError(
            "it is not a zip (torch's format since 1.6, or truncated): load it once with "
            "torch.load(..., weights_only=True) and save it with safetensors.torch.save_file"
        )
    with ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(remote or path))
        file = None if remote else stack.enter_context(path.open("rb"))
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it holds no single data.pkl; it was not written by torch.save")
        root = pickles[0].removesuffix("data.pkl")
        order = members.get(root + "byteorder")
        if order and _member(archive, order, 16) != b"little":
            raise ValueError("it is big-endian; convert it to safetensors where it was made")
        content = _unpickle(_member(archive, members[pickles[0]], MAX_PICKLE_BYTES))
        if not isinstance(content, dict):
            raise ValueError("it holds no dict of tensors")
        if not all(isinstance(name, str) for name in content):
            raise ValueError("it holds a dict with a key that is not text")
        return {
            name: _locate(name, tensor, path, root, members, file)
            for name, tensor in content.items()
        }


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int) -> bytes:
    """A small member of the zip; torch compresses none, so none can swell."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"its {info.filename} is compressed, which torch.save never does")
    if info.file_size > most:
        raise ValueError(f"its {info.filename} is {info.file_size} bytes, which no model needs")
    with archive.open(info) as stream:
        return stream.read(most)


def _locate(
    name: str,
    tensor: object,
    path: Path,
    root: str,
    members: dict[str, zipfile.ZipInfo],
    file: BinaryIO | None,
) -> Location:
    if not isinstance(tensor, _Tensor):
        raise ValueError(f"{name!r} is not a plain tensor")
    storage, shape = tensor.storage, tensor.shape
    info = members.get(f"{root}data/{storage.key}")
    if info is None or info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"tensor {name!r} has no uncompressed data")
    itemsize = ITEMSIZE[tensor.dtype]
    if storage.count * ITEMSIZE[storage.dtype] != info.file_size:
        raise ValueError(
            f"it is truncated: tensor {name!r} lies in {storage.count} values of {storage.dtype}, "
            f"its data is {info.file_size} bytes"
        )
    row_major = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    strides = zip(shape, tensor.stride, row_major, strict=True)
    if math.prod(shape) and any(size > 1 and have != want for size, have, want in strides):
        raise ValueError(f"tensor {name!r} is not contiguous")
    end = (tensor.start + math.prod(shape)) * itemsize
    if end > info.file_size:
        raise ValueError(f"it is truncated: tensor {name!r} needs more bytes than it holds")
    if file is None:
        return Location(path, 0, tensor.dtype, shape, negative=tensor.negative)
    file.seek(info.header_offset)
    local = file.read(30)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise ValueError(f"tensor {name!r}: its zip entry is damaged")
    name_length, extra_length = struct.unpack("<HH", local[26:30])
    begin = info.header_offset + 30 + name_length + extra_length
    if begin + info.file_size > path.stat().st_size:
        raise ValueError(f"it is truncated: tensor {name!r} needs more bytes than it holds")
    begin += tensor.start * itemsize
    return Location(path, begin, tensor.dtype, shape, negative=tensor.negative)


def _unpickle(data: bytes) -> object:
    """Follow a pickle's instructions as far as a state dict needs them."""
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


def _storage(reference: Any) -> _Storage:
    kind, dtype, key, _device, count = reference
    if kind != "storage" or dtype not in _STORAGES.values() or not isinstance(key, str):
        raise ValueError("its pickle refers to something that is not a storage")
    if type(count) is not int:
        raise ValueError(f"storage {key!r} has no size")
    return _Storage(key, dtype, count)


def _rebuild_tensor(
    storage: object,
    start: object,
    shape: object,
    stride: object,
    _grad: object = None,
    _hooks: object = None,
    metadata: object = None,
) -> _Tensor:
    if not isinstance(storage, _Storage):
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
) -> _Tensor:
    """A tensor whose dtype no storage class has; its storage is bytes."""
    if not isinstance(storage, _Storage) or not isinstance(dtype, _Dtype):
        raise ValueError("its pickle describes a malformed tensor")
    return _tensor(storage, dtype.name, start, shape, stride, metadata)


def _tensor(
    storage: _Storage, dtype: str, start: object, shape: object, stride: object, metadata: object
) -> _Tensor:
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
            return _Tensor(storage, dtype, start, shape, stride, negative)  # type: ignore[arg-type]
    raise ValueError("its pickle describes a malformed tensor")


def _rebuild_parameter(
    data: object, _grad: object = None, _hooks: object = None, state: object = None
) -> object:
    for attributes in state if isinstance(state, tuple) else (state,):
        if isinstance(attributes, dict) and "data" in attributes:
            raise ValueError("its pickle gives a tensor other data")
    return data


def _rebuild_from_type(call: object, _type: object, arguments: object, state: object) -> object:
    """A tensor with attributes: as another function makes it."""
    if not isinstance(call, _Call) or not isinstance(arguments, tuple):
        raise ValueError("its pickle describes a malformed tensor")
    return _rebuild_parameter(_CALLS[call.name](*arguments), state=state)


def _from_other_device(data: object, dtype: object, *_: object) -> object:
    """A TPU's tensor, as it was on the CPU."""
    if isinstance(data, _Tensor) and dtype == _Dtype(data.dtype):
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
