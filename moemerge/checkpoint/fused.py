"""Fused tensors as their parts. Each part is a byte range, because tensors are row-major; nothing
is copied.

Projections that a family fuses become separate projections, and stacked experts become separate
experts, with the names in `Names`. A prefix that all names share (`_orig_mod.`, `module.`) is left
out.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moemerge.architectures import LAYER, MLP, Names, count_of, reading_of
from moemerge.checkpoint.location import Location
from moemerge.families import Family, record_of

MAX_PARTS = 1 << 19
"""Ten times what any model has; it bounds the cost of a hostile header."""

_MODULE = re.compile(r"(.+)\.(weight|bias)")
_APART = re.compile(rf"(\w+\.)(?:switch_mlp|experts)\.({'|'.join(MLP)})\.weight")
"""Matrices of all experts as mlx-lm saves them: one tensor for each kind."""

_FIRST = "model.embed_tokens.weight"
_ROWS = re.compile(r"(.+)\[(\d{1,18}):(\d{1,18})\]")


@dataclass(frozen=True)
class View:
    """A part of the tensor `of`: `shape` values from value `start` on."""

    of: str
    start: int
    shape: tuple[int, ...]

    def at(self, whole: Location) -> Location:
        """The place of the part, given the place of the whole tensor.

        Raises:
            ValueError: the tensor is too short, or the part begins within a block.
        """
        if self.start + math.prod(self.shape) > math.prod(whole.shape):
            raise ValueError(f"{self.of} is {list(whole.shape)}, which is not what it was")
        part = whole.part(self.start, self.shape)
        if part is None:
            raise ValueError(f"a part of {self.of} begins within a block of {whole.encoding.name}")
        return part


def views_of(
    tensors: Mapping[str, Location], family: object, config: Mapping[str, Any]
) -> dict[str, View]:
    """The parts of a model's fused tensors, by the names of the parts.

    Raises:
        ValueError: a tensor's shape does not fit its name and the config.
    """
    prefix = _prefix(tensors)
    own = {name.removeprefix(prefix): at for name, at in tensors.items()}
    parts: Iterable[tuple[str, View]] = ()
    record = record_of(config)
    if record and record.fused:
        parts = _parts_of_family(own, record, config)
    elif reading := reading_of(family, own):
        parts = _parts_of_moe(own, reading.names, config)
    views: dict[str, View] = {}
    for name, view in parts:
        if name in own and name != view.of:
            raise ValueError(f"{name!r} is there, and in {view.of!r} again")
        if len(views) == MAX_PARTS:
            raise ValueError(f"{view.of!r} and others claim to be more parts than any model has")
        views[name] = view
    if not prefix:
        return views
    fused = {view.of for view in views.values()}
    views |= {name: View(name, 0, at.shape) for name, at in own.items() if name not in fused}
    return {name: dataclasses.replace(v, of=prefix + v.of) for name, v in views.items()}


def with_views(tensors: Mapping[str, Location], views: Mapping[str, View]) -> dict[str, Location]:
    """The tensors with each fused tensor replaced by its views."""
    fused = {view.of for view in views.values()}
    kept = {name: at for name, at in tensors.items() if name not in fused}
    return kept | {name: view.at(tensors[view.of]) for name, view in views.items()}


def rows_of(views: Mapping[str, View], of: str) -> dict[str, range]:
    """The rows of tensor `of` that each of its views has, by the views' names."""
    found = {}
    for name, view in views.items():
        if view.of == of:
            start = view.start // math.prod(view.shape[1:])
            found[name] = range(start, start + view.shape[0])
    return found


def row_name(of: str, rows: range) -> str:
    """The name for some rows of a tensor."""
    return f"{of}[{rows.start}:{rows.stop}]"


def rows_named(tensors: Mapping[str, Location], names: Iterable[str]) -> dict[str, View]:
    """The views for those of `names` that `row_name` made, if their tensor exists."""
    views = {}
    for name in names:
        found = _ROWS.fullmatch(name)
        if found and found[1] in tensors:
            shape, start, stop = tensors[found[1]].shape, int(found[2]), int(found[3])
            if name not in tensors and shape and start < stop <= shape[0]:
                views[name] = _rows(found[1], shape, start, stop)
    return views


def _prefix(names: Iterable[str]) -> str:
    """The prefix of all names before their usual beginning; empty if they do not share one."""
    first = next((name for name in names if name.endswith(f".{_FIRST}")), _FIRST)
    prefix = first.removesuffix(_FIRST)
    return prefix if all(name.startswith(prefix) for name in names) else ""


def _rows(of: str, shape: tuple[int, ...], start: int, stop: int) -> View:
    return View(of, start * math.prod(shape[1:]), (stop - start, *shape[1:]))


def _parts_of_family(
    tensors: Mapping[str, Location], record: Family, config: Mapping[str, Any]
) -> Iterator[tuple[str, View]]:
    """The modules in a family's fused modules, one below the other."""
    for name, at in tensors.items():
        inside = LAYER.fullmatch(name)
        module = _MODULE.fullmatch(inside[3]) if inside else None
        if not inside or not module or module[1] not in record.fused:
            continue
        keys = record.fused[module[1]]
        shares = {part: config[key] if key else 1 for part, key in keys.items()}
        whole = sum(shares.values())
        if not at.shape or not at.shape[0] or at.shape[0] % whole:
            raise ValueError(f"{name} is {list(at.shape)}, which is not cut into {whole} parts")
        start = 0
        for part, share in shares.items():
            stop = start + at.shape[0] // whole * share
            yield f"{inside[1]}{part}.{module[2]}", _rows(name, at.shape, start, stop)
            start = stop


def _parts_of_moe(
    tensors: Mapping[str, Location], names: Names, config: Mapping[str, Any]
) -> Iterator[tuple[str, View]]:
    """Each expert's matrices: parts of a tensor with all gates and ups, and of one with all
    downs."""
    count, hidden = count_of(config), config.get("hidden_size")
    for name, at in tensors.items():
        found = LAYER.fullmatch(name)
        layer, inside = (found[1], found[3]) if found else ("", "")
        if inside in names.routers:
            yield layer + names.router, View(name, 0, at.shape)
        elif matrices := _stacked(inside, names):
            if not _is_stack(at.shape, matrices, count, hidden):
                rows = "2F" if len(matrices) > 1 else "F"
                wanted = [count, hidden, "F"] if 2 in matrices else [count, rows, hidden]
                raise ValueError(f"{name} is {list(at.shape)}, config.json says {wanted}")
            experts, high, wide = at.shape
            step = high // len(matrices)
            for row in range(experts * len(matrices)):
                expert, which = divmod(row, len(matrices))
                view = View(name, row * step * wide, (step, wide))
                yield layer + names.matrix(expert, matrices[which]), view


def _stacked(inside: str, names: Names) -> tuple[int, ...]:
    """The places in `MLP` of the matrices that a stacked tensor holds; empty if it is not
    stacked."""
    if names.closed:
        return ()
    if inside in names.uppers:
        return (0, 1)
    found = _APART.fullmatch(inside)
    if found and names.expert == f"{found[1]}experts.":
        return (MLP.index(found[2]),)
    return (2,) if inside in names.lowers else ()


def _is_stack(
    shape: tuple[int, ...], matrices: tuple[int, ...], count: object, hidden: object
) -> bool:
    """Whether the shape is (E, 2F, D) or (E, F, D) for gates and ups, or (E, D, F) for downs."""
    if len(shape) != 3 or not math.prod(shape):
        return False
    fits = shape[1] == hidden if 2 in matrices else shape[2] == hidden
    return fits and shape[1] % len(matrices) == 0 and shape[0] == count
