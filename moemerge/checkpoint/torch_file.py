"""A `.bin` shard's tensors, located without torch and without running anything it holds.

`torch.save` writes an uncompressed zip: `data.pkl` describes the tensors, `data/KEY` holds each
storage's bytes. The pickle is read by an unpickler that knows four names and builds no object of
any other class; what it yields is checked like a safetensors header.
"""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moemerge.checkpoint.tensors import ITEMSIZE, Location

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str
    count: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_header(path: Path) -> dict[str, Location]:
    """The tensors of a `.bin` file by name.

    Raises:
        ValueError: the file is not a zip of `torch.save`, or holds what is not a plain tensor.
        OSError: the file cannot be read.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(
            "it is not a zip (torch's format since 1.6, or truncated): load it once with "
            "torch.load(..., weights_only=True) and save it with safetensors.torch.save_file"
        )
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it holds no single data.pkl; it was not written by torch.save")
        root = pickles[0].removesuffix("data.pkl")
        order = root + "byteorder"
        if order in members and archive.read(order) != b"little":
            raise ValueError("it is big-endian; convert it to safetensors where it was made")
        try:
            with archive.open(pickles[0]) as stream:
                content = _Unpickler(stream).load()
        except ValueError:
            raise
        except Exception as error:  # a hostile pickle can raise anything
            raise ValueError(f"its pickle cannot be read ({error})") from error
        if not isinstance(content, dict):
            raise ValueError("it holds no dict of tensors")
        return {
            str(name): _locate(str(name), tensor, path, root, members, file)
            for name, tensor in content.items()
        }


def _locate(
    name: str,
    tensor: object,
    path: Path,
    root: str,
    members: dict[str, zipfile.ZipInfo],
    file: Any,
) -> Location:
    if not isinstance(tensor, _Tensor):
        raise ValueError(f"{name!r} is not a plain tensor")
    storage, shape = tensor.storage, tensor.shape
    info = members.get(f"{root}data/{storage.key}")
    if info is None or info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"tensor {name!r} has no uncompressed data")
    row_major = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    strides = zip(shape, tensor.stride, row_major, strict=True)
    if any(size > 1 and stride != expected for size, stride, expected in strides):
        raise ValueError(f"tensor {name!r} is not contiguous; save the model as safetensors")
    itemsize = ITEMSIZE[storage.dtype]
    end = (tensor.start + math.prod(shape)) * itemsize
    file.seek(info.header_offset)
    local = file.read(30)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise ValueError(f"tensor {name!r}: its zip entry is damaged")
    name_length, extra_length = struct.unpack("<HH", local[26:30])
    begin = info.header_offset + 30 + name_length + extra_length
    if end > info.file_size or begin + info.file_size > path.stat().st_size:
        raise ValueError(f"it is truncated: tensor {name!r} needs more bytes than it holds")
    return Location(path, begin + tensor.start * itemsize, storage.dtype, shape)


class _Unpickler(pickle.Unpickler):
    """Knows the names that a state dict needs; every other name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        known: dict[tuple[str, str], Callable[..., object]] = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if (module, name) not in known:
            raise ValueError(f"its pickle asks for {module}.{name}, which a state dict never needs")
        return known[module, name]

    def persistent_load(self, reference: Any) -> _Storage:
        kind, dtype, key, _device, count = reference
        if kind != "storage" or dtype not in _STORAGES.values():
            raise ValueError("its pickle refers to something that is not a storage")
        return _Storage(str(key), dtype, int(count))


def _rebuild_tensor(
    storage: object, start: object, shape: object, stride: object, *_: object
) -> _Tensor:
    numbers = [start, *(shape if isinstance(shape, tuple) else [None])]
    numbers += stride if isinstance(stride, tuple) else [None]
    natural = all(type(number) is int and number >= 0 for number in numbers)
    if not isinstance(storage, _Storage) or not natural:
        raise ValueError("its pickle describes a malformed tensor")
    return _Tensor(storage, start, shape, stride)  # type: ignore[arg-type]
