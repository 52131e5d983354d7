"""How one output tensor is made of source tensors; the only arithmetic on weights.

A recipe is a small frozen tree. One that is a bare `Read` in the output's dtype is a byte copy and
never becomes a tensor; every other is computed in float32 over fixed blocks of rows, so that its
bytes depend on nothing but itself, and converted to the output's dtype at the end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moemerge.checkpoint import Donor, Location, read_bytes
from moemerge.errors import ReadError

if TYPE_CHECKING:
    import numpy as np
    import torch

Sources = Mapping[str, Mapping[str, Location]]
"""The tensors of each source, by the reference's text."""

BLOCK_VALUES = 1 << 20
"""Values a block: arithmetic and random draws run over whole rows of about this many."""

COPY_BYTES = 16 << 20
"""Bytes a read, where a recipe is a copy."""


@dataclass(frozen=True)
class Read:
    """A source's tensor as it is."""

    source: str
    tensor: str


@dataclass(frozen=True)
class LowRank:
    """of + scale * up @ down, with `down` (r, in) and `up` (out, r): a LoRA delta."""

    of: Recipe
    down: Read
    up: Read
    scale: float


@dataclass(frozen=True)
class Noise:
    """of + Gaussian noise of standard deviation `std`, drawn anew for every output tensor."""

    of: Recipe
    std: float
    seed: int


@dataclass(frozen=True)
class Scale:
    """of * factor."""

    of: Recipe
    factor: float


Recipe = Read | LowRank | Noise | Scale

_KINDS = {"read": Read, "low_rank": LowRank, "noise": Noise, "scale": Scale}


def of_donor(donor: Donor, tensor: str) -> Recipe:
    """The donor's tensor: its model's, with the adapter's part on top if it has one."""
    read = Read(donor.model.reference.text, tensor)
    if donor.adapter is None:
        return read
    on_top = donor.adapter.checkpoint.reference.text
    if tensor in donor.adapter.replacements:
        return Read(on_top, donor.adapter.replacements[tensor])
    if tensor in donor.adapter.deltas:
        delta = donor.adapter.deltas[tensor]
        return LowRank(read, Read(on_top, delta.down), Read(on_top, delta.up), delta.scale)
    return read


def reads(recipe: Recipe) -> Iterator[Read]:
    """Every source tensor that the recipe reads; the first has the output's shape."""
    if isinstance(recipe, Read):
        yield recipe
        return
    yield from reads(recipe.of)
    if isinstance(recipe, LowRank):
        yield recipe.down
        yield recipe.up


def is_copy(recipe: Recipe, dtype: str, sources: Sources) -> bool:
    """Whether the recipe's bytes in `dtype` are a source's bytes."""
    return isinstance(recipe, Read) and sources[recipe.source][recipe.tensor].dtype == dtype


def stream(
    name: str, shape: tuple[int, ...], dtype: str, recipe: Recipe, sources: Sources
) -> Iterator[memoryview]:
    """The bytes of output tensor `name`, in order, a block at a time.

    Raises:
        ReadError: a source is truncated, or a computed value is NaN or Inf.
    """
    if isinstance(recipe, Read) and is_copy(recipe, dtype, sources):
        location = sources[recipe.source][recipe.tensor]
        for start in range(0, location.nbytes, COPY_BYTES):
            yield memoryview(read_bytes(location, start, min(COPY_BYTES, location.nbytes - start)))
        return
    import torch

    for block in _blocks(name, shape, recipe, sources):
        out = block.to(_torch_dtype(dtype))
        if not torch.isfinite(out).all():
            read = next(reads(recipe))
            raise ReadError(
                f"{read.source}: {read.tensor} holds NaN or Inf, or a value that {dtype} cannot; "
                "use another model or dtype"
            )
        yield out.contiguous().view(torch.uint8).numpy().data.cast("B")


def load(name: str, shape: tuple[int, ...], recipe: Recipe, sources: Sources) -> torch.Tensor:
    """The whole tensor, in its source's dtype where it is a bare read, else in float32."""
    import torch

    if isinstance(recipe, Read):
        location = sources[recipe.source][recipe.tensor]
        return _read(location, range(shape[0]), math.prod(shape[1:])).reshape(shape)
    return torch.cat(list(_blocks(name, shape, recipe, sources))).reshape(shape)


def generator(seed: int, name: str, block: int) -> np.random.Generator:
    """The random numbers of one block of one tensor: the same on every machine, in any order."""
    import numpy as np

    digest = hashlib.blake2b(f"{seed}\0{name}\0{block}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data: `{"read": {...}}` and so on."""
    kind = next(kind for kind, made in _KINDS.items() if isinstance(recipe, made))
    fields = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}
    return {
        kind: {
            key: to_json(value) if isinstance(value, Recipe) else value
            for key, value in fields.items()
        }
    }


def from_json(data: dict[str, Any]) -> Recipe:
    """The recipe that `to_json` wrote.

    Raises:
        ValueError, KeyError, TypeError: the data is not one.
    """
    ((kind, fields),) = data.items()
    made: Recipe = _KINDS[kind](
        **{key: from_json(v) if isinstance(v, dict) else v for key, v in fields.items()}
    )
    return made


def _blocks(
    name: str, shape: tuple[int, ...], recipe: Recipe, sources: Sources
) -> Iterator[torch.Tensor]:
    """The tensor's blocks of rows, (rows, width); the block size is a function of the shape."""
    count, width = (shape[0] if shape else 1), math.prod(shape[1:])
    step = max(1, BLOCK_VALUES // max(width, 1))
    whole: dict[Read, torch.Tensor] = {}
    for index, start in enumerate(range(0, count, step)):
        rows = range(start, min(start + step, count))
        yield _evaluate(recipe, name, index, rows, width, sources, whole)


def _evaluate(
    recipe: Recipe,
    name: str,
    block: int,
    rows: range,
    width: int,
    sources: Sources,
    whole: dict[Read, torch.Tensor],
) -> torch.Tensor:
    import torch

    if isinstance(recipe, Read):
        return _read(sources[recipe.source][recipe.tensor], rows, width)
    value = _evaluate(recipe.of, name, block, rows, width, sources, whole).float()
    if isinstance(recipe, Scale):
        return value * recipe.factor
    if isinstance(recipe, Noise):
        drawn = generator(recipe.seed, name, block).standard_normal(value.shape, dtype="float32")
        return value + recipe.std * torch.from_numpy(drawn)
    if recipe.down not in whole:
        down = sources[recipe.down.source][recipe.down.tensor]
        whole[recipe.down] = _read(down, range(down.shape[0]), width).float()
    up = sources[recipe.up.source][recipe.up.tensor]
    return value + recipe.scale * (_read(up, rows, up.shape[1]).float() @ whole[recipe.down])


def _read(location: Location, rows: range, width: int) -> torch.Tensor:
    """Some rows of a source's tensor, in its own dtype: (len(rows), width)."""
    import torch

    dtype = _torch_dtype(location.dtype)
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
