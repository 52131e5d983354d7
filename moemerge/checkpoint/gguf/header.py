"""A GGUF file's header: its fields and the places of its tensors; every claim in it is checked.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): `GGUF`, the version, the
number of tensors and of fields, the fields (name, type, value), the tensors (name, dimensions,
type, offset), then the data, aligned, to which the offsets are relative. All numbers are
little-endian.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from moemerge.checkpoint.gguf.blocks import BY_NUMBER
from moemerge.checkpoint.location import Location

ALIGNMENT = 32
STRING, ARRAY = 8, 9
_FORMATS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"
}  # fmt: skip
"""The types of numbers, for `struct`."""

_MOST_HEADER = 1 << 30
_MOST_NAME = 1 << 16
_MOST_TENSOR_NAME = 64
_STEP = 1 << 20


@dataclass(frozen=True)
class Field:
    """One field: its value in Python, and its bytes in the file, type included."""

    value: Any
    raw: bytes

    @property
    def kind(self) -> int:
        """The number of its type."""
        return int.from_bytes(self.raw[:4], "little")


@dataclass(frozen=True)
class Header:
    """The header of a file: its fields, and its tensors as they stand there."""

    fields: dict[str, Field]
    tensors: dict[str, Location]

    def value(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The value of a field, or `default` if there is none.

        Raises:
            ValueError: it has another type.
        """
        if name not in self.fields:
            return default
        found = self.fields[name].value
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(found, kind) or (isinstance(found, bool) and bool not in kinds):
            raise ValueError(f"its {name} is {_short(found)}, which is of another type")
        return found


def read_header(path: Path, remote: BinaryIO | None = None) -> Header:
    """Read a file's header; with `remote`, the file is read there and `path` is where it will be.

    Raises:
        ValueError: it is truncated or claims what cannot be; says which.
        OSError: the file cannot be read.
    """
    with remote or path.open("rb") as file:
        return _Reader(file, path).header()


class _Reader:
    """Reads on in a file, in steps; knows how much is left of it."""

    def __init__(self, file: BinaryIO, path: Path):
        self.size = file.seek(0, os.SEEK_END)
        file.seek(0)
        self.file, self.path, self.data, self.at = file, path, bytearray(), 0

    def header(self) -> Header:
        if self.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self.number("I")
        if version not in (2, 3):
            big = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            what = "its numbers are big-endian" if big else f"its version is {version}, not 2 or 3"
            raise ValueError(what)
        tensors, fields = self.number("Q"), self.number("Q")
        self.expect(tensors, 24, "tensors")
        self.expect(fields, 13, "fields")
        found: dict[str, Field] = {}
        for _ in range(fields):
            name = self.text("a field's name", _MOST_NAME)
            if not name:
                raise ValueError("it has a field without a name")
            if name in found:
                raise ValueError(f"it has the field {name!r} twice")
            start = self.at
            kind = self.number("I")
            value = self.value(kind, name)
            found[name] = Field(value, bytes(self.data[start : self.at]))
        header = Header(found, {})
        alignment = header.value("general.alignment", int, ALIGNMENT)
        if alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise ValueError(f"its general.alignment is {alignment}, no power of two from 8 on")
        listed = dict(self.tensors(tensors))
        start = self.at + -self.at % alignment
        header.tensors.update(_placed(listed, start, self.size, alignment, self.path))
        return header

    def tensors(self, count: int) -> Iterator[tuple[str, tuple[tuple[int, ...], int, int]]]:
        """Each tensor: its name, shape (rows first), type and offset."""
        seen = set[str]()
        for _ in range(count):
            name = self.text("a tensor's name", _MOST_TENSOR_NAME)
            if name in seen:
                raise ValueError(f"it has the tensor {name!r} twice")
            seen.add(name)
            dimensions = self.number("I")
            if not 1 <= dimensions <= 4:
                raise ValueError(f"{name} has {dimensions} dimensions, not 1 to 4")
            shape = tuple(self.number("Q") for _ in range(dimensions))
            yield name, (shape[::-1], self.number("I"), self.number("Q"))

    def value(self, kind: int, name: str) -> Any:
        if kind in _FORMATS:
            if kind == 7:
                flag = self.number("B")
                if flag > 1:
                    raise ValueError(f"the field {name!r} is neither true nor false")
                return bool(flag)
            return self.number(_FORMATS[kind])
        if kind == STRING:
            return self.text(f"the text of {name!r}")
        if kind != ARRAY:
            raise ValueError(f"the field {name!r} is of type {kind}, which does not exist")
        inner, count = self.number("I"), self.number("Q")
        if inner == ARRAY:
            raise ValueError(f"the field {name!r} is an array of arrays")
        if inner == STRING:
            self.expect(count, 8, f"texts in {name!r}")
            return self.texts(count, name)
        if inner not in _FORMATS:
            raise ValueError(f"the field {name!r} has items of type {inner}, which does not exist")
        size = struct.calcsize("<" + _FORMATS[inner])
        self.expect(count, size, f"items in {name!r}")
        return list(struct.unpack(f"<{count}{_FORMATS[inner]}", self.take(count * size)))

    def texts(self, count: int, name: str) -> list[str]:
        """Many texts, such as a tokenizer's tokens; a token may be a part of a character."""
        found, length_at, data = list[str](), struct.Struct("<Q").unpack_from, self.data
        at = self.at
        for _ in range(count):
            self.fill(at + 8)
            (length,) = length_at(data, at)
            end = at + 8 + length
            if length > self.size:
                raise ValueError(f"a text in {name!r} has {length} bytes, more than there can be")
            self.fill(end)
            found.append(data[at + 8 : end].decode("utf-8", "replace"))
            at = end
        self.at = at
        return found

    def text(self, what: str, most: int = _MOST_HEADER) -> str:
        length = self.number("Q")
        if length > most or length > self.size - self.at:
            raise ValueError(f"{what} has {length} bytes, more than there can be")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{what} is not UTF-8") from None

    def number(self, form: str) -> Any:
        size = struct.calcsize("<" + form)
        return struct.unpack("<" + form, self.take(size))[0]

    def expect(self, count: int, least: int, what: str) -> None:
        """Refuse a count of items that the rest of the file cannot hold."""
        if count * least > self.size - self.at:
            raise ValueError(f"it claims {count} {what}, more than the file can hold")

    def take(self, nbytes: int) -> bytes:
        """The next bytes."""
        end = self.at + nbytes
        self.fill(end)
        found = bytes(self.data[self.at : end])
        self.at = end
        return found

    def fill(self, end: int) -> None:
        """Read the file up to byte `end`, at least."""
        if end <= len(self.data):
            return
        if end > self.size:
            raise ValueError(f"it is truncated: its header goes on behind byte {self.size}")
        if end > _MOST_HEADER:
            raise ValueError("its header is longer than 1 GiB, which no real file's is")
        while len(self.data) < end:
            more = self.file.read(max(_STEP, end - len(self.data)))
            if not more:
                raise ValueError("it became shorter while it was read")
            self.data += more


def _placed(
    listed: Mapping[str, tuple[tuple[int, ...], int, int]],
    start: int,
    size: int,
    alignment: int,
    path: Path,
) -> Iterator[tuple[str, Location]]:
    """Each tensor's place, if it is within the file, aligned, and no other's."""
    ends = list[tuple[int, int, str]]()
    for name, (shape, kind, offset) in listed.items():
        encoding = BY_NUMBER.get(kind)
        if encoding is None:
            raise ValueError(f"{name} is of type {kind}, which is not known")
        values = 1
        for length in shape:
            values *= length
        if not 0 < values < 1 << 62 or 0 in shape:
            raise ValueError(f"{name} has the shape {list(shape)}, which cannot be")
        if shape[-1] % encoding.block_values:
            what = f"rows of {shape[-1]} values, no multiple of {encoding.name}'s block of"
            raise ValueError(f"{name} has {what} {encoding.block_values}")
        if offset % alignment:
            raise ValueError(f"{name} begins at {offset}, which is not aligned to {alignment}")
        at = Location(path, start + offset, encoding, shape)
        if at.offset + at.nbytes > size:
            raise ValueError(f"{name} ends at byte {at.offset + at.nbytes}, the file has {size}")
        ends.append((at.offset, at.offset + at.nbytes, name))
        yield name, at
    ends.sort()
    for (_, end, one), (begin, _, other) in pairwise(ends):
        if begin < end:
            raise ValueError(f"{one} and {other} overlap")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
