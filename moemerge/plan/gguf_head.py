"""The first bytes of a GGUF file: fields and the list of tensors; see checkpoint/gguf/header.py."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any

from moemerge.checkpoint import NUMBERS
from moemerge.plan.plan import ALIGNMENT, PlannedTensor

_MAGIC, _VERSION = b"GGUF", 3
_U16, _U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 2, 4, 5, 6, 7, 8, 9

_ITEMS = {_F32: "f", _I32: "i", _BOOL: "?"}


def encoded(value: Any) -> bytes:
    """A field's type and value: whole numbers as uint32, others as float32."""
    if isinstance(value, bool):
        return struct.pack("<IB", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    items = list(value)
    kind = next(
        (
            kind
            for of, kind in ((str, _STRING), (float, _F32), (bool, _BOOL))
            if items and isinstance(items[0], of)
        ),
        _I32,
    )
    head = struct.pack("<IIQ", _ARRAY, kind, len(items))
    if kind == _STRING:
        return head + b"".join(map(_text, items))
    return head + struct.pack(f"<{len(items)}{_ITEMS[kind]}", *items)


def split_fields(number: int, count: int, tensors: int) -> dict[str, bytes]:
    """The fields of part `number` (from 0) of a split file, whose parts have so many tensors."""
    return {
        "split.no": struct.pack("<IH", _U16, number),
        "split.count": struct.pack("<IH", _U16, count),
        "split.tensors.count": struct.pack("<Ii", _I32, tensors),
    }


def _text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def head_of(fields: Mapping[str, bytes], tensors: Iterable[PlannedTensor]) -> bytes:
    """The first bytes of a file with these fields (type and value each) and tensors, up to the
    data."""
    tensors = list(tensors)
    parts = [_MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(fields))]
    for name, raw in fields.items():
        parts += [_text(name), raw]
    offset = 0
    for tensor in tensors:
        shape = tensor.shape[::-1]
        parts.append(_text(tensor.name))
        parts.append(struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
        parts.append(struct.pack("<IQ", NUMBERS[tensor.dtype], offset))
        offset += tensor.nbytes
        offset += -offset % ALIGNMENT
    made = b"".join(parts)
    return made + b"\0" * (-len(made) % ALIGNMENT)
