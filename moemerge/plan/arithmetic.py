"""A recipe worked out: the bytes of one output tensor; the only arithmetic on weights.

Bytes that are a source's own never become a tensor; in another dtype they are converted on their
way. Everything else is computed in float32 over fixed blocks of rows, and converted to the output's
dtype at the end. Its bytes depend on nothing but the recipe, on any processor and with any number
of threads: each step is one that IEEE 754 rounds in one way, and the sums of a matrix product,
whose order is the kernel's own, are exact (`_grid`).
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moemerge.checkpoint import (
    PLAIN,
    Location,
    numpy_dtype,
    read_bytes,
    read_into,
    read_numbers,
    read_rows,
    read_values,
)
from moemerge.errors import ReadError
from moemerge.plan.recipe import (
    Cut,
    Fill,
    Join,
    LowRank,
    Mean,
    Noise,
    Read,
    Recipe,
    Renew,
    Scale,
    Sources,
    locate,
    reads,
    shape_of,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

    _Bits = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]

BLOCK_VALUES = 1 << 18
"""Values a block: arithmetic and random draws run over whole rows of about this many."""

_VOCABULARY = ("embed_tokens", "lm_head")


class WithStatistics(dict[str, Mapping[str, Location]]):
    """Sources, with the mean and standard deviation of each matrix that was asked for.

    For one file or tensor at a time: the next run's sources may hold other bytes.
    """

    def __init__(self, sources: Sources):
        super().__init__(sources)
        self.seen: dict[object, tuple[float, float]] = {}


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

    `start` and the view's length are whole values; any cut gives the same bytes.

    Raises:
        ReadError: a source is truncated or changed, or a value is NaN or Inf.
    """
    import numpy as np

    location = locate(recipe, sources)
    if location and location.is_plain(dtype):
        read_into(location, start, view)
        _refuse_what_is_broken(view, dtype, next(reads(recipe)))
    elif location:
        _convert(view, start, dtype, recipe, location)
    elif isinstance(recipe, Fill):
        np.frombuffer(view, numpy_dtype(dtype))[...] = recipe.value
    elif isinstance(recipe, Join) and recipe.axis == 0:
        end = 0
        for number, part in enumerate(recipe.of):
            its_shape, first = shape_of(part, sources), end
            end += PLAIN[dtype].nbytes(math.prod(its_shape))
            low, high = max(start, first), min(start + len(view), end)
            if low < high:
                its_view, its_name = view[low - start : high - start], f"{name}[{number}]"
                fill(its_view, low - first, its_name, its_shape, dtype, part, sources)
    else:
        _compute(view, start, name, shape, dtype, recipe, sources)


def load(
    name: str,
    shape: tuple[int, ...],
    recipe: Recipe,
    sources: Sources,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """The whole tensor, in its source's dtype where it is a bare read, else in float32.

    `into` is an earlier result for a tensor of the same kind, whose memory is used again: pages
    that are new to a process cost more than reading into them.
    """
    import torch

    location = locate(recipe, sources)
    dtype = location.dtype if location else "F32"
    if into is None or (into.shape, into.dtype) != (shape, _torch_dtype(dtype)):
        into = torch.empty(shape, dtype=_torch_dtype(dtype))
    view = into.view(torch.uint8).numpy().reshape(-1).data
    fill(view, 0, name, shape, dtype, recipe, sources)
    return into


def load_rows(
    recipe: Recipe, rows: list[int], sources: Sources
) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """Some rows of a matrix, in float32; of its sources, only these are read."""
    if location := locate(recipe, sources):
        return list(read_rows(location, rows))
    whole = dict[Read, Any]()
    return [
        _evaluate(recipe, "", 0, range(row, row + 1), sources, whole).float().numpy()[0]
        for row in rows
    ]


def generator(seed: int, name: str, block: int) -> np.random.Generator:
    """The random numbers of one block of one tensor: the same on every machine, in any order."""
    import numpy as np

    digest = hashlib.blake2b(f"{seed}\0{name}\0{block}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def _convert(view: memoryview, start: int, dtype: str, recipe: Recipe, location: Location) -> None:
    """A bare read in another dtype: value by value, so it needs no fixed blocks, and no torch."""
    import numpy as np

    target = np.frombuffer(view, numpy_dtype(dtype))
    first = start // target.itemsize
    for at in range(0, len(target), BLOCK_VALUES):
        part = target[at : at + BLOCK_VALUES]
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
    """Evaluate the fixed blocks of rows that `view` overlaps and copy what it wants of each."""
    import torch

    sources = sources if isinstance(sources, WithStatistics) else WithStatistics(sources)
    rows, width = (shape[0] if shape else 1), math.prod(shape[1:])
    step = max(1, BLOCK_VALUES // width)
    block_bytes = PLAIN[dtype].nbytes(step * width)
    end, whole = start + len(view), dict[Read, Any]()
    for block in range(start // block_bytes, -(-end // block_bytes)):
        of_block = range(block * step, min((block + 1) * step, rows))
        value = _evaluate(recipe, name, block, of_block, sources, whole)
        done = value.to(_torch_dtype(dtype)).view(torch.uint8).numpy().reshape(-1)
        bits = done.view(f"u{PLAIN[dtype].block_bytes}")
        _refuse_what_is_not_finite(bits, dtype, next(reads(recipe)))
        data = done.data
        offset = block * block_bytes
        low, high = max(start, offset), min(end, offset + len(data))
        view[low - start : high - start] = data[low - offset : high - offset]


_INFINITY = {"F64": 0x7FF << 52, "F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
"""By its bits; those of every NaN are higher."""


def _refuse_what_is_broken(view: memoryview, dtype: str, read: Read) -> None:
    """Check values on their way from a source to the output.

    Rows of a vocabulary pass: those of tokens that no text has may hold anything.
    """
    import numpy as np

    if dtype not in _INFINITY or any(part in read.tensor for part in _VOCABULARY):
        return
    if not _is_finite(np.frombuffer(view, f"u{PLAIN[dtype].block_bytes}"), dtype):
        raise ReadError(f"{read.source}: {read.tensor} holds NaN or Inf; use another model")


def _refuse_what_is_not_finite(bits: _Bits, dtype: str, read: Read) -> None:
    """Check values that were computed or converted."""
    if not _is_finite(bits, dtype):
        raise ReadError(
            f"{read.source}: {read.tensor} holds NaN or Inf, or a value that {dtype} cannot hold; "
            "use another model or dtype"
        )


def _is_finite(bits: _Bits, dtype: str) -> bool:
    """Told by bits: twice as fast as by value, and for bfloat16 far more.

    In two calls for all of it: after each, a thread must wait for whoever runs Python meanwhile.
    """
    infinity, sign = _INFINITY[dtype], 1 << (8 * bits.itemsize - 1)
    return not bits.size or bool(
        bits.view(f"i{bits.itemsize}").max() < infinity and bits.max() < sign + infinity
    )


_local = threading.local()


def _scratch(nbytes: int) -> memoryview:
    """This thread's memory for what it reads, kept: fresh pages cost more than the reading."""
    if len(getattr(_local, "scratch", b"")) < nbytes:
        _local.scratch = bytearray(nbytes)
    return memoryview(_local.scratch)[:nbytes]


def _evaluate(
    recipe: Recipe,
    name: str,
    block: int,
    rows: range,
    sources: Sources,
    whole: dict[Read, Any],
) -> torch.Tensor:
    """Some rows of what the recipe makes; `whole` keeps what every block needs."""
    import torch

    if location := locate(recipe, sources):
        return _read(location, rows)
    if isinstance(recipe, Fill):
        return torch.full((len(rows), math.prod(recipe.shape[1:])), recipe.value)
    if isinstance(recipe, Mean):
        total = torch.zeros((len(rows), math.prod(shape_of(recipe, sources)[1:])))
        for part, weight in zip(recipe.of, recipe.weights, strict=True):
            value = _evaluate(part, name, block, rows, sources, whole)
            total += value.float() * weight  # rounded twice everywhere: `alpha` may be fused
        return total
    if isinstance(recipe, Join):
        return _join(recipe, name, block, rows, sources, whole)
    if isinstance(recipe, Cut):
        return _cut(recipe, name, block, rows, sources, whole)
    assert not isinstance(recipe, Read)  # it has a location
    value = _evaluate(recipe.of, name, block, rows, sources, whole).float()
    if isinstance(recipe, Scale):
        return value * recipe.factor
    if isinstance(recipe, Noise):
        drawn = generator(recipe.seed, name, block).standard_normal(value.shape, dtype="float32")
        return value + recipe.std * torch.from_numpy(drawn)
    if isinstance(recipe, Renew):
        return _renew(recipe, value, name, block, rows, sources)
    delta = _up(recipe, rows, sources, whole) @ _down(recipe, sources, whole)
    return value + recipe.scale * delta.float()


def _down(recipe: LowRank, sources: Sources, whole: dict[Read, Any]) -> torch.Tensor:
    """All of the delta's `down`, (r, in), in float64."""
    if recipe.down not in whole:
        down = sources[recipe.down.source][recipe.down.tensor]
        matrix = _read(down, range(down.shape[0])).double()
        whole[recipe.down] = _grid(matrix.T if recipe.transposed else matrix, 0)
    found: torch.Tensor = whole[recipe.down]
    return found


def _up(recipe: LowRank, rows: range, sources: Sources, whole: dict[Read, Any]) -> torch.Tensor:
    """Some rows of the delta's `up`, (len(rows), r), in float64."""
    up = sources[recipe.up.source][recipe.up.tensor]
    if not recipe.transposed:
        return _grid(_read(up, rows)[:, recipe.first :: recipe.every].double(), 1)
    if recipe.up not in whole:
        whole[recipe.up] = _read(up, range(up.shape[0])).T
    return _grid(whole[recipe.up][rows.start : rows.stop].double(), 1)


def _grid(matrix: torch.Tensor, axis: int) -> torch.Tensor:
    """A matrix whose product with its partner float64 computes without any rounding.

    `axis` is the one that the product sums over, of r values. Each row (or column) is rounded to
    whole multiples of a power of two, 22 bits or more below its largest value: a float32 product is
    no closer. A sum of r products of such has 53 bits at most, so no order of summation, fused
    or not, on one thread or many, gives another. NaN and Inf in it come out as such.
    """
    import numpy as np
    import torch

    values = matrix.numpy()
    bits = (53 - math.ceil(math.log2(values.shape[axis]))) // 2
    with np.errstate(invalid="ignore"):
        top = np.maximum(values.max(axis, keepdims=True), -values.min(axis, keepdims=True))
        unit = np.ldexp(1.0, np.frexp(top)[1] - bits)
        rounded = values / unit
        np.rint(rounded, out=rounded)
        rounded *= unit
    return torch.from_numpy(np.ascontiguousarray(rounded))


def _join(
    recipe: Join, name: str, block: int, rows: range, sources: Sources, whole: dict[Read, Any]
) -> torch.Tensor:
    import torch

    if recipe.axis:
        parts = [_evaluate(part, name, block, rows, sources, whole) for part in recipe.of]
        return torch.cat([part.float() for part in parts], dim=1)
    found, first = [], 0
    for part in recipe.of:
        end = first + shape_of(part, sources)[0]
        own = range(max(rows.start, first) - first, min(rows.stop, end) - first)
        if len(own):
            found.append(_evaluate(part, name, block, own, sources, whole).float())
        first = end
    return torch.cat(found)


def _cut(
    recipe: Cut, name: str, block: int, rows: range, sources: Sources, whole: dict[Read, Any]
) -> torch.Tensor:
    import torch

    chosen: Any = range(recipe.start, recipe.stop)
    if recipe.order:
        if recipe.order not in whole:
            whole[recipe.order] = read_numbers(sources[recipe.order.source][recipe.order.tensor])
        chosen = whole[recipe.order][recipe.start : recipe.stop]
    if recipe.axis:
        value = _evaluate(recipe.of, name, block, rows, sources, whole)
        if recipe.order is None:
            return value.narrow(1, recipe.start, recipe.stop - recipe.start)
        return value.index_select(1, torch.from_numpy(chosen))
    if recipe.order is None:
        own = range(recipe.start + rows.start, recipe.start + rows.stop)
        return _evaluate(recipe.of, name, block, own, sources, whole)
    each = [range(row, row + 1) for row in chosen[rows.start : rows.stop].tolist()]
    return torch.cat([_evaluate(recipe.of, name, block, own, sources, whole) for own in each])


def _renew(
    recipe: Renew, value: torch.Tensor, name: str, block: int, rows: range, sources: Sources
) -> torch.Tensor:
    import torch

    count = shape_of(recipe, sources)[recipe.axis]
    order = generator(recipe.seed, recipe.key, 0).permutation(count)
    anew = torch.zeros(count, dtype=torch.bool)
    anew[torch.from_numpy(order[: round(recipe.share * count)])] = True
    mean, deviation = _statistics(recipe.of, sources)
    draws = generator(recipe.seed, f"{name}, anew", block)
    drawn = torch.from_numpy(draws.standard_normal(value.shape, dtype="float32"))
    chosen = anew if recipe.axis else anew[rows.start : rows.stop, None]
    return torch.where(chosen, mean + deviation * drawn, value)


def _statistics(recipe: Recipe, sources: Sources) -> tuple[float, float]:
    """The mean and standard deviation of a matrix, kept for its other stretches."""
    seen = sources.seen if isinstance(sources, WithStatistics) else {}
    if recipe not in seen:
        rows, *rest = shape_of(recipe, sources)
        step, whole = max(1, BLOCK_VALUES // math.prod(rest)), dict[Read, Any]()
        total = squares = 0.0
        for block, first in enumerate(range(0, rows, step)):
            own = range(first, min(first + step, rows))
            value = _evaluate(recipe, "", block, own, sources, whole).double().numpy()
            total, squares = total + float(value.sum()), squares + float((value * value).sum())
        mean = total / (rows * math.prod(rest))
        spread = squares / (rows * math.prod(rest)) - mean * mean
        seen[recipe] = mean, math.sqrt(max(spread, 0.0))
    return seen[recipe]


def _read(location: Location, rows: range) -> torch.Tensor:
    """Some rows of a source's tensor, in its own dtype: (len(rows), width)."""
    import torch

    dtype, width = _torch_dtype(location.dtype), math.prod(location.shape[1:])
    if location.encoding.decode:
        values = read_values(location, rows.start * width, len(rows) * width)
        return torch.from_numpy(values).reshape(len(rows), width)
    row_bytes = width * dtype.itemsize
    raw = read_bytes(location, rows.start * row_bytes, len(rows) * row_bytes)
    if not raw:
        return torch.empty((len(rows), width), dtype=dtype)
    return torch.frombuffer(raw, dtype=dtype).reshape(len(rows), width)


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16
    }[name]  # fmt: skip
