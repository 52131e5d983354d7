"""The plan of an edited mixture: what its weights are made of, and the shards to write."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moemerge.architectures import as_file, in_files, name_of
from moemerge.checkpoint import Checkpoint, Donor
from moemerge.mixture.open import Moe
from moemerge.mixture.parts import Part, planned
from moemerge.options import ShardSize, WriteOptions
from moemerge.plan import (
    Cut,
    Join,
    LowRank,
    Mean,
    Noise,
    Plan,
    PlannedTensor,
    Read,
    Recipe,
    Renew,
    Scale,
    Shard,
    Sources,
    cut,
    recipe,
    shards_of,
)
from moemerge.prepare import source_of

if TYPE_CHECKING:
    from moemerge.gates import Matrix

_GIVEN = "given"
"""The gate mode of a mixture whose routers are those that it came with."""


@dataclass(frozen=True)
class Edit:
    """An edit: the parts, config.json and expert names of the new mixture.

    `donors` are the dense models that it adds, `story` is the line of its card, and `text` the YAML
    config of a merge that would give it (empty if not known). `same_model` keeps the old card.
    `routers` computes the tensors that parts read from `ROUTERS`.
    """

    moe: Moe
    parts: Sequence[Part]
    config: dict[str, Any]
    experts: tuple[str, ...]
    per_token: int
    story: str
    donors: tuple[Donor, ...] = ()
    text: str = ""
    same_model: bool = False
    routers: Callable[[Sources], dict[str, Matrix]] | None = None


def plan_of(edit: Edit, options: WriteOptions) -> tuple[Plan, tuple[Shard, ...]]:
    """The plan for the manifest, and the same shards with recipes that read the old files.

    Tensors stay in their files; routers come first, and new tensors last.
    """
    moe, before = edit.moe, edit.moe.manifest
    tensors = [
        (file, replace(tensor, name=in_files(tensor.name, edit.config)))
        for file, tensor in planned(edit.parts, moe.tensors)
    ]
    limit = ShardSize.parse(options.shard_size).max_bytes(2)
    new = [tensor for file, tensor in tensors if not (file or tensor.made)]
    kept: dict[str, list[PlannedTensor]] = {}
    for file, tensor in tensors:
        if file:
            kept.setdefault("" if tensor.made else file, []).append(tensor)
    if "" in kept:
        groups = [tuple(kept.pop("")), *map(tuple, kept.values()), *cut(new, limit)]
    else:
        groups = list(cut((tensor for _, tensor in tensors), limit))
    origins = _origins(moe)
    said = [tuple(_as_merged(tensor, moe.text, origins) for tensor in group) for group in groups]
    read = {read.source for group in said for t in group for read in recipe.reads(t.recipe)}
    known = {one.reference: one for one in before.plan.sources} if before else {}
    opened = {one.reference.text: source_of(one) for one in checkpoints_of(edit)}
    if before:  # the old shards are made of the sources as they were
        opened = {n: s if n == moe.text else before.plan.remembered(s) for n, s in opened.items()}
    sources = tuple(source for name, source in {**known, **opened}.items() if name in read)
    inputs = before.plan.gate_inputs if before else ""
    shards = shards_of(said, sources, inputs)
    plan = Plan(
        architecture=name_of(edit.config["model_type"]) or str(edit.config["model_type"]),
        gate_mode=before.plan.gate_mode if before else _GIVEN,
        gate_inputs=inputs,
        seed=before.plan.seed if before else 0,
        dtype=groups[-1][-1].dtype,
        experts=edit.experts,
        experts_per_token=edit.per_token // moe.segments,
        config=as_file(edit.config),
        sources=sources,
        shards=shards,
    )
    pairs = zip(shards, groups, strict=True)
    return plan, tuple(replace(shard, tensors=group) for shard, group in pairs)


def _origins(moe: Moe) -> dict[str, PlannedTensor]:
    """Each tensor of the old manifest, and each expert's part of its stacked tensors."""
    new_name, before = moe.checkpoint.renamed, moe.manifest.plan.tensors if moe.manifest else ()
    found = {new_name.get(one.name, one.name): one for one in before}
    for name, view in moe.checkpoint.views.items():
        whole, values = found.get(view.of), math.prod(view.shape)
        if whole and isinstance(whole.recipe, Join):
            parts, at = whole.recipe.of, view.start // values
            if whole.parameters == len(parts) * values:
                drawn_for = f"{whole.name}[{at}]"
                found[name] = PlannedTensor(drawn_for, view.shape, whole.dtype, parts[at])
    return found


def _as_merged(tensor: PlannedTensor, old: str, origins: dict[str, PlannedTensor]) -> PlannedTensor:
    """A copy of an old tensor with its recipe in the old manifest, if that still gives its values.

    It does not if the name changed and the recipe draws at random, because draws depend on the
    tensor's name.
    """
    made = tensor.recipe
    if isinstance(made, Join) and tensor.expert == -1:
        shape = (tensor.parameters // len(made.of) // tensor.shape[-1], tensor.shape[-1])
        parts = (
            PlannedTensor(f"{tensor.name}[{number}]", shape, tensor.dtype, part)
            for number, part in enumerate(made.of)
        )
        return replace(
            tensor, recipe=Join(tuple(_as_merged(part, old, origins).recipe for part in parts))
        )
    before = origins.get(made.tensor) if isinstance(made, Read) and made.source == old else None
    same = before and (before.shape, before.dtype) == (tensor.shape, tensor.dtype)
    if before is None or not same or (before.name != tensor.name and _draws(before.recipe)):
        return tensor
    return replace(tensor, recipe=before.recipe)


def _draws(made: Recipe) -> bool:
    if isinstance(made, Mean | Join):
        return any(map(_draws, made.of))
    draws = isinstance(made, Noise | Renew)
    return draws or (isinstance(made, LowRank | Scale | Cut) and _draws(made.of))


def checkpoints_of(edit: Edit) -> list[Checkpoint]:
    """The mixture's checkpoint, then those of the added models and of their adapters."""
    adapters = [donor.adapter.checkpoint for donor in edit.donors if donor.adapter]
    return [edit.moe.checkpoint, *(donor.model for donor in edit.donors), *adapters]
