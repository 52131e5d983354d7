"""The tensors of a mixture, each with its expert, its layer and how it is made.

Shapes: E experts, D hidden size, F an expert's intermediate size.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from moemerge.architectures import (
    LAYER,
    MLP,
    Names,
)
from moemerge.checkpoint import (
    FLOATS,
    Checkpoint,
)
from moemerge.errors import Findings
from moemerge.plan import Join, PlannedTensor, Read, Recipe


@dataclass(frozen=True)
class Part:
    """One tensor of a mixture and the recipe that makes it. Stacked experts have a part for each
    expert's matrix.

    `expert` and `which` (an index into `MLP`) say which matrix of which expert it is. `made` is
    `router` (E, D) or `bias` (E, the selection bias) where each row belongs to an expert. `shared`
    marks a tensor of experts that are always on, or of their gate. `file` is the file it is in.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    recipe: Recipe
    file: str = ""
    layer: str = ""
    expert: int | None = None
    which: int = 0
    made: str = ""
    shared: bool = False


def planned(parts: Iterable[Part], names: Names) -> Iterator[tuple[str, PlannedTensor]]:
    """The parts as tensors to write, each with the file that it is read from.

    Where experts are stacked, the experts of a layer become two tensors, at the place of the first.
    """
    stacks: dict[str, list[Part]] = {}
    parts = tuple(parts)
    for part in parts if names.stacked else ():
        if part.expert is not None:
            stacks.setdefault(part.layer, []).append(part)
    for part in parts:
        if part.expert is None or not names.stacked:
            made = PlannedTensor(
                part.name, part.shape, part.dtype, part.recipe, part.expert, part.made
            )
            yield part.file, made
        elif own := stacks.pop(part.layer, ()):
            own = sorted(own, key=lambda one: (one.expert or 0, one.which))
            yield part.file, _stacked(part.layer + names.uppers[0], own, (0, 1))
            yield part.file, _stacked(part.layer + names.lowers[0], own, (2,))


def _stacked(name: str, own: list[Part], matrices: tuple[int, ...]) -> PlannedTensor:
    """The given matrices of a layer as one tensor, expert by expert."""
    chosen = [part for part in own if part.which in matrices]
    first = chosen[0]
    shape = (len(chosen) // len(matrices), first.shape[0] * len(matrices), first.shape[1])
    return PlannedTensor(name, shape, first.dtype, Join(tuple(p.recipe for p in chosen)), -1)


def parts_of(opened: Checkpoint, names: Names) -> Iterator[Part]:
    """Every tensor, in the order of files and of offsets in a file."""
    text = opened.reference.text
    matrices = "|".join(names.matrices)
    own = re.compile(rf"{re.escape(names.expert)}(0|[1-9]\d{{0,5}})\.({matrices})\.weight")
    order = sorted(opened.tensors.items(), key=lambda one: (one[1].file.name, one[1].offset))
    for name, at in order:
        part = Part(name, at.shape, at.dtype, Read(text, name), at.file.name)
        if found := LAYER.fullmatch(name):
            inside = found[3]
            shared = inside.startswith(names.shared)
            part = dataclasses.replace(part, layer=found[1], shared=shared)
            matrix = own.fullmatch(inside)
            if inside == names.router:
                part = dataclasses.replace(part, made="router")
            elif inside.endswith(names.bias):
                part = dataclasses.replace(part, made="bias")
            elif matrix:
                which = names.matrices.index(matrix[2])
                part = dataclasses.replace(part, expert=int(matrix[1]), which=which)
        yield part


def check_parts(
    parts: Iterable[Part],
    count: object,
    config: dict[str, Any],
    text: str,
    findings: Findings,
) -> int:
    """Record missing or misshapen experts and routers. Returns F, the intermediate size."""
    fix = "use the weights and the config.json of one and the same model"
    hidden = config.get("hidden_size")
    found: dict[str, dict[tuple[int, int], Part]] = {}
    routers: dict[str, Part] = {}
    inner = 0
    for part in parts:
        rows = part.made and part.shape[:1] != (count,)
        wide = part.made == "router" and part.shape[1:] != (hidden,)
        if rows or wide:
            said = f"{part.name} is {list(part.shape)}, config.json says {count} experts"
            findings.problem(text, said, fix)
        if part.made == "router":
            routers[part.layer] = part
        if part.expert is None:
            continue
        found.setdefault(part.layer, {})[part.expert, part.which] = part
        inner = inner or part.shape[-1 if part.which == 2 else 0]
        wanted = (hidden, inner) if part.which == 2 else (inner, hidden)
        if part.shape != wanted:
            said = f"{part.name} is {list(part.shape)}, config.json says {list(wanted)}"
            findings.problem(text, said, fix)
        if part.dtype not in FLOATS.values():
            what = f"{part.name} holds {part.dtype} values"
            findings.problem(text, what, "use the original weights")
    if not found:
        findings.problem(text, "holds no experts under names that are known", fix)
    for layer in found.keys() | routers.keys():
        have = found.get(layer, {})
        all_there = isinstance(count, int) and len(have) == count * len(MLP)
        if not all_there or layer not in routers or max(have)[0] != len(have) // len(MLP) - 1:
            what = f"{layer.removesuffix('.')} holds {len(have)} matrices of experts"
            router = "a router" if layer in routers else "no router"
            findings.problem(text, f"{what} and {router}, config.json says {count} experts", fix)
    return inner
