"""Some rows of an output tensor, computed from its recipe in float32.

The result depends on the recipe alone: not on the processor, and not on the number of threads. Each
step is an operation that IEEE 754 rounds in one way. The sums of a matrix product are exact
(`_grid`), because each kernel adds in its own order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moemerge.checkpoint import Location, read_bytes, read_numbers, read_values
from moemerge.plan.recipe import (
    Cut,
    Fill,
    Halve,
    Join,
    LowRank,
    Mean,
    Noise,
    Read,
    Recipe,
    Renew,
    Scale,
    Sources,
    Transpose,
    Values,
    Weighed,
    locate,
    shape_of,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

BLOCK_VALUES = 1 << 18
"""About how many values a block holds. Arithmetic and random draws run over blocks of rows."""


class WithStatistics(dict[str, Mapping[str, Location]]):
    """Sources, with the mean and standard deviation of each matrix already measured.

    Made anew for each file or tensor, because the sources of the next run may hold other bytes.
    """

    def __init__(self, sources: Sources):
        super().__init__(sources)
        self.seen: dict[object, tuple[float, float]] = {}


def block_rows(width: int) -> int:
    """How many rows of `width` values a block has; at least one."""
    return max(1, BLOCK_VALUES // width)


def evaluate(
    recipe: Recipe,
    name: str,
    block: int,
    rows: range,
    sources: Sources,
    whole: dict[Read, Any],
) -> torch.Tensor:
    """Return rows of the recipe's matrix: (len(rows), width).

    `block` is the number of these rows' block: it keys the random draws. `whole` keeps source
    tensors that every block needs.

    Raises:
        ReadError: a source is truncated or changed.
    """
    import torch

    if location := locate(recipe, sources):
        return _read(location, rows)
    if isinstance(recipe, Fill):
        return torch.full((len(rows), math.prod(recipe.shape[1:])), recipe.value)
    if isinstance(recipe, Mean):
        total = torch.zeros((len(rows), math.prod(shape_of(recipe, sources)[1:])))
        for part, weight in zip(recipe.of, recipe.weights, strict=True):
            value = evaluate(part, name, block, rows, sources, whole)
            total += value.float() * weight  # always rounded twice; add_'s alpha may be fused
        return total
    if isinstance(recipe, Join):
        return _join(recipe, name, block, rows, sources, whole)
    if isinstance(recipe, Cut):
        return _cut(recipe, name, block, rows, sources, whole)
    if isinstance(recipe, Transpose):
        every = range(shape_of(recipe.of, sources)[0])
        return evaluate(recipe.of, name, 0, every, sources, whole).T[rows.start : rows.stop]
    if isinstance(recipe, Halve):
        return _halve(recipe, name, block, rows, sources, whole)
    assert not isinstance(recipe, Read | Values)  # a Read has a location, a file has Values
    value = evaluate(recipe.of, name, block, rows, sources, whole).float()
    if isinstance(recipe, Weighed):
        return value
    if isinstance(recipe, Scale):
        return value * recipe.factor
    if isinstance(recipe, Noise):
        drawn = generator(recipe.seed, name, block).standard_normal(value.shape, dtype="float32")
        return value + recipe.std * torch.from_numpy(drawn)
    if isinstance(recipe, Renew):
        return _renew(recipe, value, name, block, rows, sources)
    delta = _up(recipe, rows, sources, whole) @ _down(recipe, sources, whole)
    return value + recipe.scale * delta.float()


def generator(seed: int, name: str, block: int) -> np.random.Generator:
    """The random generator of one block of one tensor; it draws the same on every machine."""
    import numpy as np

    digest = hashlib.blake2b(f"{seed}\0{name}\0{block}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def _down(recipe: LowRank, sources: Sources, whole: dict[Read, Any]) -> torch.Tensor:
    """The delta's whole `down`, (r, in), in float64."""
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
    """Round a matrix so that float64 computes its product with the other matrix exactly.

    `axis` is the one that the product sums over; it has r values. Each row (or column) is rounded
    to multiples of a power of two, at least 22 bits below its largest value; a float32 product is
    no more exact. A sum of r products then needs at most 53 bits, so every order of summation gives
    the same value: fused or not, on one thread or many. NaN and Inf stay NaN and Inf.
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
        parts = [evaluate(part, name, block, rows, sources, whole) for part in recipe.of]
        return torch.cat([part.float() for part in parts], dim=1)
    found, first = [], 0
    for part in recipe.of:
        end = first + shape_of(part, sources)[0]
        own = range(max(rows.start, first) - first, min(rows.stop, end) - first)
        if len(own):
            found.append(evaluate(part, name, block, own, sources, whole).float())
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
        value = evaluate(recipe.of, name, block, rows, sources, whole)
        if recipe.order is None:
            return value.narrow(1, recipe.start, recipe.stop - recipe.start)
        return value.index_select(1, torch.from_numpy(chosen))
    if recipe.order is None:
        own = range(recipe.start + rows.start, recipe.start + rows.stop)
        return evaluate(recipe.of, name, block, own, sources, whole)
    each = [range(row, row + 1) for row in chosen[rows.start : rows.stop].tolist()]
    return torch.cat([evaluate(recipe.of, name, block, own, sources, whole) for own in each])


def _halve(
    recipe: Halve, name: str, block: int, rows: range, sources: Sources, whole: dict[Read, Any]
) -> torch.Tensor:
    first = rows.start - rows.start % recipe.head
    heads = range(first, rows.stop + -rows.stop % recipe.head)
    value = evaluate(recipe.of, name, block, heads, sources, whole)
    return value[[recipe.old_row(row) - first for row in rows]]


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
    """The mean and standard deviation of a matrix, kept for its other blocks."""
    seen = sources.seen if isinstance(sources, WithStatistics) else {}
    if recipe not in seen:
        rows, *rest = shape_of(recipe, sources)
        step, whole = block_rows(math.prod(rest)), dict[Read, Any]()
        total = squares = 0.0
        for block, first in enumerate(range(0, rows, step)):
            own = range(first, min(first + step, rows))
            value = evaluate(recipe, "", block, own, sources, whole).double().numpy()
            total, squares = total + float(value.sum()), squares + float((value * value).sum())
        mean = total / (rows * math.prod(rest))
        spread = squares / (rows * math.prod(rest)) - mean * mean
        seen[recipe] = mean, math.sqrt(max(spread, 0.0))
    return seen[recipe]


def _read(location: Location, rows: range) -> torch.Tensor:
    """Rows of a source's tensor in the source's dtype, or decoded: (len(rows), width)."""
    import torch

    dtype, width = torch_dtype(location.dtype), math.prod(location.shape[1:])
    if location.encoding.decode:
        values = read_values(location, rows.start * width, len(rows) * width)
        return torch.from_numpy(values).reshape(len(rows), width)
    row_bytes = width * dtype.itemsize
    raw = read_bytes(location, rows.start * row_bytes, len(rows) * row_bytes)
    if not raw:
        return torch.empty((len(rows), width), dtype=dtype)
    return torch.frombuffer(raw, dtype=dtype).reshape(len(rows), width)


def torch_dtype(name: str) -> torch.dtype:
    """Torch's dtype for a safetensors dtype's name, such as `BF16`."""
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16
    }[name]  # fmt: skip
