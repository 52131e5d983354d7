"""The place of a tensor's bytes, and functions that read some of them."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moemerge.errors import ReadError
from moemerge.hub import HubError, Remote, read_range

if TYPE_CHECKING:
    import numpy as np

    Numbers = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Encoding:
    """How a tensor's values are stored: in blocks of `block_values` values, row-major, each of
    `block_bytes` bytes.

    The last block may have more values than the tensor. `decode` turns the bytes of whole blocks
    into float32 values, (blocks * block_values,), each block by itself. It is None if the bytes are
    plain numbers.
    """

    name: str
    block_values: int
    block_bytes: int
    decode: Callable[[memoryview], Numbers] | None = None

    def nbytes(self, values: int) -> int:
        """The bytes of that many values from the beginning of a block."""
        return -(-values // self.block_values) * self.block_bytes


PLAIN = {
    name: Encoding(name, 1, nbytes)
    for name, nbytes in {
        "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
        "U16": 2, "U32": 4, "U64": 8, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    }.items()
}  # fmt: skip
"""Plain numbers, by the dtype names of the safetensors format."""

MAX_DIMENSIONS = 64
"""numpy's limit of dimensions; a header with more is hostile."""

FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The dtypes that a merge can write, by the names in configs and torch."""


class Stamp(NamedTuple):
    """The identity of a file: its size, its times (ns) and its inode number."""

    size: int
    modified: int
    changed: int
    number: int

    @classmethod
    def of(cls, stat: os.stat_result) -> Stamp:
        """The stamp of a file now."""
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)

    def is_of(self, stat: os.stat_result) -> bool:
        """Whether a file is still the same.

        A file that replaced it has another inode number, and was renamed later. On some network
        drives the number alone proves nothing, and a new link to a file changes only one of its
        times.
        """
        now = Stamp.of(stat)
        return self[:2] == now[:2] and (self.changed == now.changed or self.number == now.number)


@dataclass(frozen=True)
class Location:
    """A tensor's bytes: `nbytes` at `offset` of `file`, little-endian.

    `stamp` is the file's when its header was read. With `remote`, the bytes are read from the file
    on the Hub. If `negative`, the values are the stored numbers with the other sign. If
    `neighbours`, the file has each head's rows, that many, in the order in which rope turns
    neighbours; they are read in transformers' order, in which it turns halves.
    """

    file: Path
    offset: int
    encoding: Encoding
    shape: tuple[int, ...]
    stamp: Stamp | None = None
    remote: Remote | None = None
    negative: bool = False
    neighbours: int = 0

    @property
    def as_stored(self) -> Location:
        """The same place, with the rows as they are in the file."""
        return dataclasses.replace(self, neighbours=0) if self.neighbours else self

    @property
    def nbytes(self) -> int:
        """The tensor's size in bytes."""
        return self.encoding.nbytes(math.prod(self.shape))

    @property
    def dtype(self) -> str:
        """The dtype in which its values are read: F32 if they are decoded."""
        return "F32" if self.encoding.decode else self.encoding.name

    def is_plain(self, dtype: str) -> bool:
        """Whether its bytes are values of that type, so that they can be copied."""
        return self.encoding.name == dtype

    def part(self, start: int, shape: tuple[int, ...]) -> Location | None:
        """The place of `shape` values from value `start` on; None if a block would be cut there."""
        if start % self.encoding.block_values:
            return None
        head = self.neighbours * math.prod(self.shape[1:])
        if head and (start % head or math.prod(shape) % head):
            return None
        offset = self.offset + self.encoding.nbytes(start)
        return dataclasses.replace(self, offset=offset, shape=shape)


def read_bytes(location: Location, start: int = 0, nbytes: int | None = None) -> bytearray:
    """Read `nbytes` (default: to the tensor's end) from byte `start` of the tensor.

    Raises:
        ReadError: as `read_into`.
    """
    buffer = bytearray(location.nbytes - start if nbytes is None else nbytes)
    read_into(location, start, memoryview(buffer))
    return buffer


def read_into(location: Location, start: int, view: memoryview) -> None:
    """Fill `view` with the tensor's bytes from byte `start`.

    Raises:
        ReadError: the file is missing, shorter than its header says, or has changed since it was
            opened.
    """
    if location.neighbours:
        _read_halves(location, start, view)
        return
    if location.remote:
        try:
            read_range(location.remote, location.offset + start, view)
        except HubError as error:
            raise ReadError(f"{location.remote.repo}: {error.what}; {error.fix}") from error
        return
    whole = view
    try:
        with location.file.open("rb", buffering=0) as file:
            file.seek(location.offset + start)
            got = -1
            while view and got:
                got = file.readinto(view)
                view = view[got:]
            stat = os.fstat(file.fileno())
    except OSError as error:
        raise ReadError(f"{location.file}: cannot be read ({error.strerror})") from error
    _check_unchanged(location, stat)
    if view:
        raise ReadError(
            f"{location.file}: ends at byte {stat.st_size}, its header promises more; "
            "it is truncated: copy or download it again"
        )
    _resign(location, start, whole)


def _read_halves(location: Location, start: int, view: memoryview) -> None:
    """Fill `view` with rows of heads, of which rope turns halves; each head is read once."""
    import numpy as np

    head, stored = location.neighbours, location.as_stored
    row_bytes = location.encoding.nbytes(math.prod(location.shape[1:]))
    head_bytes = head * row_bytes
    first, last = start // head_bytes, -(-(start + len(view)) // head_bytes)
    raw = bytearray((last - first) * head_bytes)
    read_into(stored, first * head_bytes, memoryview(raw))
    rows = np.frombuffer(raw, np.uint8).reshape(last - first, head // 2, 2, row_bytes)
    halves = np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(-1)
    skipped = start - first * head_bytes
    np.frombuffer(view, np.uint8)[:] = halves[skipped : skipped + len(view)]


def _resign(location: Location, start: int, view: memoryview) -> None:
    """Change the sign of values that were read from byte `start`, if they are stored negated."""
    if location.negative:
        import numpy as np

        size = location.encoding.block_bytes
        np.frombuffer(view, np.uint8)[(size - 1 - start) % size :: size] ^= 0x80


def check_unchanged(location: Location) -> None:
    """Check that a tensor's file has not changed since its header was read.

    Raises:
        ReadError: the file was replaced or changed.
    """
    try:
        _check_unchanged(location, location.file.stat())
    except OSError as error:
        raise ReadError(f"{location.file}: cannot be read ({error.strerror})") from error


def _check_unchanged(location: Location, stat: os.stat_result) -> None:
    if location.stamp and not location.stamp.is_of(stat):
        raise ReadError(f"{location.file}: changed since the merge began; run it again")


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a safetensors float dtype name (bfloat16 comes from ml_dtypes)."""
    import ml_dtypes
    import numpy as np

    types: dict[str, Any] = {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
    }
    found: np.dtype[Any] = np.dtype(types[name])
    return found


def read_values(location: Location, start: int, count: int) -> Numbers:
    """Read `count` values from value `start` on, in the tensor's `dtype`.

    Raises:
        ReadError: as `read_into`.
    """
    import numpy as np

    encoding = location.encoding
    first, skipped = divmod(start, encoding.block_values)
    nbytes = encoding.nbytes(skipped + count)
    raw = read_bytes(location, first * encoding.block_bytes, nbytes)
    if encoding.decode is None:
        return np.frombuffer(raw, numpy_dtype(location.dtype))
    return encoding.decode(memoryview(raw))[skipped : skipped + count]


def read_rows(location: Location, rows: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Read some rows of a matrix: (len(rows), columns), as float32."""
    import numpy as np

    width = math.prod(location.shape[1:])
    return np.stack([read_values(location, row * width, width) for row in rows]).astype(np.float32)


def read_numbers(location: Location) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A vector of whole numbers (I32 or I64)."""
    import numpy as np

    kind = {"I32": "<i4", "I64": "<i8"}[location.dtype]
    return np.frombuffer(read_bytes(location), kind).astype(np.int64)
