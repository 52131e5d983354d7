"""The bytes of one output tensor, made from its recipe.

A tensor that is only copied is read straight into the output. A tensor that only changes its dtype
is converted value by value. Everything else is computed in float32 over fixed blocks of rows
(`blocks`), and converted to the output's dtype at the end.
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Any

from moemerge.checkpoint import (
    ENCODINGS,
    QUANTISED,
    Location,
    encode,
    numpy_dtype,
    read_into,
    read_rows,
    read_values,
    weights_of,
)
from moemerge.errors import ReadError
from moemerge.plan import blocks
from moemerge.plan.blocks import WithStatistics, block_rows, evaluate, torch_dtype
from moemerge.plan.recipe import (
    Fill,
    Halve,
    Join,
    Read,
    Recipe,
    Sources,
    Transpose,
    Values,
    Weighed,
    locate,
    reads,
    shape_of,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

    _Bits = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]

_BAND_BYTES = 1 << 23
"""The most bytes of a matrix that is being transposed in memory at a time."""

_VOCABULARY = ("embed_tokens", "lm_head")


def fill(
    view: memoryview,
    start: int,
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    recipe: Recipe,
    sources: Sources,
) -> None:
    """Fill `view` with the bytes of output tensor `name` from byte `start`.

    `start` and the view's length are in bytes, and multiples of the dtype's size. The bytes are the
    same however the tensor is cut into views.

    Raises:
        ReadError: a source is truncated or changed, or a value is NaN or Inf.
    """
    import numpy as np

    location = locate(recipe, sources)
    if location and location.is_plain(dtype):
        read_into(location, start, view)
        _refuse_what_is_broken(view, dtype, next(reads(recipe)))
    elif location and dtype not in QUANTISED:
        _convert(view, start, dtype, recipe, location)
    elif isinstance(recipe, Halve) and (of := _plain(recipe.of, dtype, sources)):
        _halve(view, start, dtype, recipe, of)
    elif isinstance(recipe, Weighed):
        sums, counts = (sources[at.source][at.tensor] for at in (recipe.sums, recipe.counts))
        weights = weights_of(sums, counts, recipe.row)
        _quantise(view, start, name, shape, dtype, recipe.of, sources, weights)
    elif isinstance(recipe, Transpose):
        _transpose(view, start, name, shape, dtype, recipe.of, sources)
    elif isinstance(recipe, Fill):
        np.frombuffer(view, numpy_dtype(dtype))[...] = recipe.value
    elif isinstance(recipe, Values):
        whole = np.array(recipe.values, numpy_dtype(dtype)).view(np.uint8)
        np.frombuffer(view, np.uint8)[:] = whole[start : start + len(view)]
    elif isinstance(recipe, Join) and recipe.axis == 0:
        end = 0
        for number, part in enumerate(recipe.of):
            its_shape, first = shape_of(part, sources), end
            end += ENCODINGS[dtype].nbytes(math.prod(its_shape))
            low, high = max(start, first), min(start + len(view), end)
            if low < high:
                its_view, its_name = view[low - start : high - start], f"{name}[{number}]"
                fill(its_view, low - first, its_name, its_shape, dtype, part, sources)
    elif dtype in QUANTISED:
        _quantise(view, start, name, shape, dtype, recipe, sources)
    else:
        _compute(view, start, name, shape, dtype, recipe, sources)


def load(
    name: str,
    shape: tuple[int, ...],
    recipe: Recipe,
    sources: Sources,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the whole tensor, of `shape`.

    A recipe that only reads gives the source's dtype, or bfloat16 if it is in ggml's blocks; any
    other recipe gives float32. `into` is an
    earlier result of the same shape and dtype. Its memory is used again, because fresh memory pages
    cost more time than the read itself.

    Raises:
        ReadError: a source is truncated or changed, or a value is NaN or Inf.
    """
    import torch

    location = locate(recipe, sources)
    dtype = location.dtype if location else "F32"
    if location and location.encoding.name in QUANTISED:
        dtype = "BF16"
    if into is None or (into.shape, into.dtype) != (shape, torch_dtype(dtype)):
        into = torch.empty(shape, dtype=torch_dtype(dtype))
    view = into.view(torch.uint8).numpy().reshape(-1).data
    fill(view, 0, name, shape, dtype, recipe, sources)
    return into


def load_rows(
    recipe: Recipe, rows: list[int], sources: Sources
) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """Return the given rows of a matrix, each in float32; only these rows are read.

    Raises:
        ReadError: a source is truncated or changed.
    """
    if location := locate(recipe, sources):
        return list(read_rows(location, rows))
    whole = dict[Read, Any]()
    return [
        evaluate(recipe, "", 0, range(row, row + 1), sources, whole).float().numpy()[0]
        for row in rows
    ]


def _plain(recipe: Recipe, dtype: str, sources: Sources) -> Location | None:
    """Where the recipe's values lie in one piece in this dtype; None if they do not."""
    location = locate(recipe, sources)
    return location if location and location.is_plain(dtype) else None


def _halve(view: memoryview, start: int, dtype: str, recipe: Halve, of: Location) -> None:
    """Fill `view` with rows of heads in another order; each head is read once."""
    row_bytes = ENCODINGS[dtype].nbytes(math.prod(of.shape[1:]))
    head_bytes, at = row_bytes * recipe.head, start
    raw = _scratch(head_bytes)
    while at < start + len(view):
        head = at // head_bytes
        read_into(of, head * head_bytes, raw)
        stop = min((head + 1) * head_bytes, start + len(view))
        while at < stop:
            row, within = divmod(at, row_bytes)
            size = min(row_bytes - within, stop - at)
            old = (recipe.old_row(row) - head * recipe.head) * row_bytes + within
            view[at - start : at - start + size] = raw[old : old + size]
            at += size
    _refuse_what_is_broken(view, dtype, next(reads(recipe)))


def _quantise(
    view: memoryview,
    start: int,
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    recipe: Recipe,
    sources: Sources,
    weights: np.ndarray[Any, Any] | None = None,
) -> None:
    """Fill `view` with a matrix in blocks of `dtype`, made of float32 rows, some at a time.

    `weights` are the importance of each column.
    """
    import numpy as np

    width = shape[-1]
    row_bytes = ENCODINGS[dtype].nbytes(width)
    step, end = block_rows(width), start + len(view)
    for first in range(start // row_bytes, -(-end // row_bytes), step):
        count = min(step, math.prod(shape) // width - first)
        values = np.empty((count, width), np.float32)
        raw = values.data.cast("B")
        fill(raw, first * width * 4, name, shape, "F32", recipe, sources)
        made = encode(values, dtype, weights)
        low, high = max(start, first * row_bytes), min(end, (first + count) * row_bytes)
        at = first * row_bytes
        view[low - start : high - start] = made[low - at : high - at]


def _transpose(
    view: memoryview,
    start: int,
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    of: Recipe,
    sources: Sources,
) -> None:
    """Fill `view` with the bytes of `of` (C, R) transposed: (R, C), of which `shape` is one.

    `of` is made in bands of rows, of which only the columns that `view` needs are kept. A view that
    begins or ends within a row costs one row more.
    """
    import numpy as np

    rows, width = shape
    kind = np.dtype(f"u{ENCODINGS[dtype].block_bytes}")
    row_bytes = width * kind.itemsize
    first, last = start // row_bytes, -(-(start + len(view)) // row_bytes)
    made = np.empty((last - first, width), kind)
    step = max(1, _BAND_BYTES // (rows * kind.itemsize))
    for at in range(0, width, step):
        count = min(step, width - at)
        band = memoryview(bytearray(count * rows * kind.itemsize))
        fill(band, at * rows * kind.itemsize, name, (width, rows), dtype, of, sources)
        made[:, at : at + count] = np.frombuffer(band, kind).reshape(count, rows)[:, first:last].T
    low = start - first * row_bytes
    view[:] = made.reshape(-1).view(np.uint8).data[low : low + len(view)]


def _convert(view: memoryview, start: int, dtype: str, recipe: Recipe, location: Location) -> None:
    """Fill `view` with a source's values in another dtype; each value alone, without torch."""
    import numpy as np

    target = np.frombuffer(view, numpy_dtype(dtype))
    first = start // target.itemsize
    for at in range(0, len(target), blocks.BLOCK_VALUES):
        part = target[at : at + blocks.BLOCK_VALUES]
        if location.encoding.decode:
            values = read_values(location, first + at, len(part))
        else:
            kind = numpy_dtype(location.dtype)
            raw = _scratch(len(part) * kind.itemsize)
            read_into(location, (first + at) * kind.itemsize, raw)
            values = np.frombuffer(raw, kind)
        with np.errstate(over="ignore", invalid="ignore"):
            part[...] = values
        _refuse_what_is_not_finite(part.view(f"u{part.itemsize}"), dtype, next(reads(recipe)))


def _compute(
    view: memoryview,
    start: int,
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    recipe: Recipe,
    sources: Sources,
) -> None:
    """Compute the fixed blocks of rows that overlap `view`, and copy the overlap of each."""
    import torch

    sources = sources if isinstance(sources, WithStatistics) else WithStatistics(sources)
    rows, width = (shape[0] if shape else 1), math.prod(shape[1:])
    step = block_rows(width)
    block_bytes = ENCODINGS[dtype].nbytes(step * width)
    end, whole = start + len(view), dict[Read, Any]()
    for block in range(start // block_bytes, -(-end // block_bytes)):
        of_block = range(block * step, min((block + 1) * step, rows))
        value = evaluate(recipe, name, block, of_block, sources, whole)
        done = value.to(torch_dtype(dtype)).view(torch.uint8).numpy().reshape(-1)
        bits = done.view(f"u{ENCODINGS[dtype].block_bytes}")
        _refuse_what_is_not_finite(bits, dtype, next(reads(recipe)))
        data = done.data
        offset = block * block_bytes
        low, high = max(start, offset), min(end, offset + len(data))
        view[low - start : high - start] = data[low - offset : high - offset]


_INFINITY = {"F64": 0x7FF << 52, "F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
"""The bits of infinity, as a whole number. The bits of every NaN are a larger number."""


def _refuse_what_is_broken(view: memoryview, dtype: str, read: Read) -> None:
    """Refuse NaN and Inf among copied values.

    Embeddings and head are not checked: rows of tokens that never occur may hold anything.
    """
    import numpy as np

    if dtype not in _INFINITY or any(part in read.tensor for part in _VOCABULARY):
        return
    if not _is_finite(np.frombuffer(view, f"u{ENCODINGS[dtype].block_bytes}"), dtype):
        raise ReadError(f"{read.source}: {read.tensor} holds NaN or Inf; use another model")


def _refuse_what_is_not_finite(bits: _Bits, dtype: str, read: Read) -> None:
    """Refuse NaN and Inf among computed or converted values, given as their bits."""
    if not _is_finite(bits, dtype):
        raise ReadError(
            f"{read.source}: {read.tensor} holds NaN or Inf, or a value that {dtype} cannot hold; "
            "use another model or dtype"
        )


def _is_finite(bits: _Bits, dtype: str) -> bool:
    """Whether no value is NaN or Inf, found from the bits.

    This is twice as fast as to compare values, and much faster still for bfloat16. There are only
    two numpy calls, because after each call a thread waits for Python's global lock.
    """
    infinity, sign = _INFINITY[dtype], 1 << (8 * bits.itemsize - 1)
    return not bits.size or bool(
        bits.view(f"i{bits.itemsize}").max() < infinity and bits.max() < sign + infinity
    )


_local = threading.local()


def _scratch(nbytes: int) -> memoryview:
    """This thread's memory to read into, kept: fresh memory pages cost more than the read."""
    if len(getattr(_local, "scratch", b"")) < nbytes:
        _local.scratch = bytearray(nbytes)
    return memoryview(_local.scratch)[:nbytes]
