"""Shards: tensors cut into files of bounded size, and the index that says which file holds each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from moemerge.files import WEIGHTS_SUFFIX
from moemerge.plan import recipe
from moemerge.plan.plan import Plan, PlannedTensor, Shard, Source, digest_of


def make_shards(
    routers: Iterable[PlannedTensor],
    others: Iterable[PlannedTensor],
    max_shard_bytes: int,
    sources: Iterable[Source],
    gate_inputs: str,
) -> tuple[Shard, ...]:
    """Cut the tensors into shards, with transformers' file names; the first holds the routers.

    A shard's digest covers its tensors' recipes and its sources' fingerprints; the digest of the
    routers' shard also covers `gate_inputs`.
    """
    return shards_of([tuple(routers), *cut(others, max_shard_bytes)], sources, gate_inputs)


def shards_of(
    groups: Sequence[tuple[PlannedTensor, ...]], sources: Iterable[Source], gate_inputs: str
) -> tuple[Shard, ...]:
    """Make one shard of each group of tensors; see `make_shards`."""
    fingerprints = {source.reference: source.fingerprint for source in sources}
    shards = []
    for number, group in enumerate(groups, start=1):
        reads = {read.source for tensor in group for read in recipe.reads(tensor.recipe)}
        made_of = [fingerprints.get(source, gate_inputs) for source in sorted(reads)]
        tensors = [vars(tensor) | {"recipe": recipe.to_json(tensor.recipe)} for tensor in group]
        file = f"model-{number:05d}-of-{len(groups):05d}{WEIGHTS_SUFFIX}"
        shards.append(Shard(file, group, digest_of([tensors, made_of])))
    return tuple(shards)


def cut(
    tensors: Iterable[PlannedTensor], max_shard_bytes: int
) -> Iterator[tuple[PlannedTensor, ...]]:
    """Yield groups in order, each as full as it can be without splitting a tensor.

    A tensor larger than `max_shard_bytes` gets its own group, as in transformers.
    """
    group: list[PlannedTensor] = []
    size = 0
    for tensor in tensors:
        if group and size + tensor.nbytes > max_shard_bytes:
            yield tuple(group)
            group, size = [], 0
        group.append(tensor)
        size += tensor.nbytes
    if group:
        yield tuple(group)


def weight_index(plan: Plan) -> dict[str, Any]:
    """The content of the index file: which shard holds which tensor, and the total bytes."""
    return {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in plan.tensors)},
        "weight_map": {t.name: shard.file for shard in plan.shards for t in shard.tensors},
    }
