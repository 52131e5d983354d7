"""Recipes: how an output tensor is made from source tensors, as data.

A recipe is a small frozen tree; `arithmetic` computes it. Nothing is read here. A `Read`, or rows
of one, is a byte copy if the dtype stays; so is a `Join` of byte copies along axis 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moemerge.checkpoint import Adapter, Donor, Location

Sources = Mapping[str, Mapping[str, Location]]
"""The tensors of each source: where each lies, by the source's reference and the tensor's name."""


ROUTERS = ""
"""The source of computed tensors, routers and what is fitted; no config can name it."""


@dataclass(frozen=True)
class Read:
    """A source's tensor, unchanged."""

    source: str
    tensor: str


@dataclass(frozen=True)
class LowRank:
    """of + scale * up @ down, with `down` (r, in) and `up` (out, r): a LoRA delta.

    Several experts may share one `up` of shape (out, r * every); then only its columns `first`,
    `first + every` and so on count. If `transposed`, `down` is (in, r) and `up` is (r, out).
    """

    of: Recipe
    down: Read
    up: Read
    scale: float
    every: int = 1
    first: int = 0
    transposed: bool = False


@dataclass(frozen=True)
class Noise:
    """of + Gaussian noise of standard deviation `std`; each output tensor has its own draws."""

    of: Recipe
    std: float
    seed: int


@dataclass(frozen=True)
class Scale:
    """of * factor."""

    of: Recipe
    factor: float


@dataclass(frozen=True)
class Mean:
    """The sum of weight * recipe; the weights sum to 1."""

    of: tuple[Recipe, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Fill:
    """A tensor with the same value everywhere."""

    value: float
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """Rows (axis 0) or columns (axis 1) `start` to `stop` of a matrix.

    With `order`, a vector of row (or column) numbers: the rows that `order[start:stop]` names.
    """

    of: Recipe
    axis: int
    start: int
    stop: int
    order: Read | None = None


@dataclass(frozen=True)
class Join:
    """Tensors concatenated: one below the other (axis 0) or side by side (axis 1)."""

    of: tuple[Recipe, ...]
    axis: int = 0


@dataclass(frozen=True)
class Renew:
    """A matrix with a `share` of its neurons drawn again at random (Drop-Upcycling).

    Neurons are rows (axis 0) or columns (axis 1). New values come from the normal distribution
    with the matrix's mean and standard deviation. `seed` and `key` decide which neurons; the
    matrices of one MLP have the same `key`. Nakamura et al. 2025, https://arxiv.org/abs/2502.19261.
    """

    of: Recipe
    axis: int
    share: float
    seed: int
    key: str


@dataclass(frozen=True)
class Halve:
    """A matrix (or vector) of heads with the rows of each head in another order.

    Of the first `turned` of each head's `head` rows, those at even places come first, then those
    at odd places. Rope that turned neighbours (rows 0 and 1) then turns halves (rows 0 and
    turned / 2). With `back`, it is the other way round.
    """

    of: Recipe
    head: int
    turned: int
    back: bool = False

    def old_row(self, row: int) -> int:
        """The row of `of` that is row `row`."""
        at, half = row % self.head, self.turned // 2
        if at >= self.turned:
            return row
        if self.back:
            return row - at + at // 2 + half * (at % 2)
        return row - at + (2 * at if at < half else 2 * (at - half) + 1)


@dataclass(frozen=True)
class Transpose:
    """A matrix with rows and columns exchanged."""

    of: Recipe


@dataclass(frozen=True)
class Values:
    """A small vector of these values."""

    values: tuple[float, ...]


@dataclass(frozen=True)
class Weighed:
    """The same values; where they are quantised, the error at each input counts by its importance.

    That is row `row` of an importance matrix, with its sums of squares and its counts of tokens.
    """

    of: Recipe
    sums: Read
    counts: Read
    row: int


Recipe = (
    Weighed
    | Values
    | Read
    | LowRank
    | Noise
    | Scale
    | Mean
    | Fill
    | Cut
    | Join
    | Renew
    | Halve
    | Transpose
)

_KINDS = {
    "read": Read, "low_rank": LowRank, "noise": Noise, "scale": Scale, "mean": Mean, "fill": Fill,
    "cut": Cut, "join": Join, "renew": Renew, "halve": Halve,
    "transpose": Transpose, "values": Values, "weighed": Weighed,
}  # fmt: skip


def of_donor(donor: Donor, tensor: str) -> Recipe:
    """The recipe of a donor's tensor: the model's tensor with the adapter's delta, if any, or the
    aligned one."""
    text, adapter = donor.model.reference.text, donor.adapter
    names = donor.aligned.get(tensor, ())
    if len(names) == 1:
        return Read(ROUTERS, names[0])
    made: Recipe = Read(text, adapter.name_in_model(tensor) if adapter else tensor)
    if adapter:
        made = adapted(adapter, tensor, made)
    if names:
        down, up = names
        return LowRank(made, Read(ROUTERS, down), Read(ROUTERS, up), 1.0)
    return made


def adapted(adapter: Adapter, tensor: str, own: Recipe) -> Recipe:
    """The recipe of a model's tensor `own` with the adapter's replacement and delta, if any."""
    on_top = adapter.checkpoint.reference.text
    if tensor in adapter.replacements:
        own = Read(on_top, adapter.replacements[tensor])
    if tensor not in adapter.deltas:
        return own
    delta = adapter.deltas[tensor]
    down, up = Read(on_top, delta.down), Read(on_top, delta.up)
    return LowRank(own, down, up, delta.scale, delta.every, delta.first, delta.transposed)


def rows(of: Recipe, start: int, stop: int) -> Recipe:
    """Rows `start` to `stop` of a matrix.

    Where the matrix is a `Join` of cuts, only the cuts that hold these rows are kept.
    """
    if not (isinstance(of, Join) and of.axis == 0 and all(isinstance(p, Cut) for p in of.of)):
        return Cut(of, 0, start, stop)
    found, first = list[Recipe](), 0
    for part in of.of:
        assert isinstance(part, Cut)
        low, high = max(start - first, 0), min(stop - first, part.stop - part.start)
        if low < high:
            kept = dataclasses.replace(part, start=part.start + low, stop=part.start + high)
            found.append(kept)
        first += part.stop - part.start
    return found[0] if len(found) == 1 else Join(tuple(found))


def reads(recipe: Recipe) -> Iterator[Read]:
    """Every source tensor that the recipe reads."""
    if isinstance(recipe, Read):
        yield recipe
    elif isinstance(recipe, Mean | Join):
        for part in recipe.of:
            yield from reads(part)
    elif not isinstance(recipe, Fill | Values):
        yield from reads(recipe.of)
    if isinstance(recipe, LowRank):
        yield recipe.down
        yield recipe.up
    elif isinstance(recipe, Weighed):
        yield recipe.sums
        yield recipe.counts
    elif isinstance(recipe, Cut) and recipe.order:
        yield recipe.order


def shape_of(recipe: Recipe, sources: Sources) -> tuple[int, ...]:
    """The shape of the tensor that the recipe makes."""
    if isinstance(recipe, Read):
        return sources[recipe.source][recipe.tensor].shape
    if isinstance(recipe, Fill):
        return recipe.shape
    if isinstance(recipe, Values):
        return (len(recipe.values),)
    if isinstance(recipe, Transpose):
        rows, columns = shape_of(recipe.of, sources)
        return columns, rows
    if isinstance(recipe, Cut):
        shape = list(shape_of(recipe.of, sources))
        shape[recipe.axis] = recipe.stop - recipe.start
        return tuple(shape)
    if isinstance(recipe, Join):
        shapes = [shape_of(part, sources) for part in recipe.of]
        joined = list(shapes[0])
        joined[recipe.axis] = sum(shape[recipe.axis] for shape in shapes)
        return tuple(joined)
    return shape_of(recipe.of[0] if isinstance(recipe, Mean) else recipe.of, sources)


def computes(recipe: Recipe) -> bool:
    """Whether the recipe computes values, which needs torch."""
    if isinstance(recipe, Cut):
        return recipe.axis != 0 or recipe.order is not None or computes(recipe.of)
    if isinstance(recipe, Join):
        return recipe.axis != 0 or any(map(computes, recipe.of))
    if isinstance(recipe, Halve | Transpose | Weighed):
        return computes(recipe.of)
    return not isinstance(recipe, Read | Fill | Values)


def locate(recipe: Recipe, sources: Sources) -> Location | None:
    """Where the recipe's values lie in one piece in a source; None if they do not."""
    if isinstance(recipe, Read):  # of what is computed, a plan does not know the place
        return sources.get(recipe.source, {}).get(recipe.tensor)
    if isinstance(recipe, Halve) and recipe.back:
        own = locate(recipe.of, sources)
        return own.as_stored if own and own.neighbours == recipe.head == recipe.turned else None
    if not isinstance(recipe, Cut) or computes(recipe):
        return None
    whole = locate(recipe.of, sources)
    if whole is None:
        return None
    shape = (recipe.stop - recipe.start, *whole.shape[1:])
    return whole.part(recipe.start * math.prod(whole.shape[1:]), shape)


def copies(recipe: Recipe, dtype: str, sources: Sources) -> list[Location]:
    """The byte ranges of sources that the recipe copies; empty if it is no byte copy."""
    if isinstance(recipe, Join) and recipe.axis == 0:
        parts = [copies(part, dtype, sources) for part in recipe.of]
        return [at for part in parts for at in part] if all(parts) else []
    at = locate(recipe, sources)
    return [at] if at and at.is_plain(dtype) else []


def is_copy(recipe: Recipe, dtype: str, sources: Sources) -> bool:
    """Whether the recipe's bytes in `dtype` are copies of sources' bytes."""
    return bool(copies(recipe, dtype, sources))


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data: `{"read": {...}}` and so on.

    A field that is False is left out, so that a plan written before the field existed keeps its
    digest.
    """
    kind = next(kind for kind, made in _KINDS.items() if isinstance(recipe, made))
    fields = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return to_json(value) if isinstance(value, Recipe) else value

    return {kind: {key: plain(value) for key, value in fields.items() if value is not False}}


def from_json(data: dict[str, Any]) -> Recipe:
    """Read a recipe from the data that `to_json` gives.

    Raises:
        ValueError, KeyError, TypeError: the data is not a recipe's.
    """
    ((kind, fields),) = data.items()

    def built(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(built(item) for item in value)
        return from_json(value) if isinstance(value, dict) else value

    made: Recipe = _KINDS[kind](**{key: built(value) for key, value in fields.items()})
    return made
