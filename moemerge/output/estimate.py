"""How long it will take to read a mixture again and compare it, by a sample of that very work."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection
from pathlib import Path

from moemerge.output.disk import buffer
from moemerge.output.shard_file import (
    ShardFile,
    chunk_digest,
    chunks,
    read_chunk,
    same_bytes,
    threads,
)
from moemerge.plan import Plan, Sources, recipe

_MOST_SECONDS = 1.0
_MOST_ROUNDS = 16

Chunk = tuple[ShardFile, Path, int, int]
"""A stretch of a shard's file: the file, its path, where it begins, its bytes."""


def seconds_to_compare(
    plan: Plan,
    out: Path,
    sources: Sources,
    compared: Collection[str],
    jobs: int,
    clock: Callable[[], float] = time.monotonic,
) -> float:
    """The time to read every chunk of the shards, and to make those in `compared` anew.

    Chunks are of four kinds: computed, converted, copied, and read alone. Some of each, drawn from
    all its chunks, are taken through the work by as many threads as will do it, so that caches,
    disks and cores count as they will.
    """
    kinds: dict[tuple[bool, ...], list[Chunk]] = {}
    for shard in plan.shards:
        file = ShardFile(shard, sources)
        for at, nbytes in chunks(file.nbytes):
            pieces = file.pieces(buffer()[:nbytes], at)
            own = [tensor for tensor, _, _ in pieces if tensor and tensor.name in compared]
            computed = any(recipe.computes(tensor.recipe) for tensor in own)
            copied = all(recipe.is_copy(t.recipe, t.dtype, sources) for t in own)
            chunk = (file, out / shard.file, at, nbytes)
            kinds.setdefault((computed, copied, bool(own)), []).append(chunk)
    draw = random.Random(plan.digest)
    return sum(
        _seconds(draw.sample(of_one, len(of_one)), compared, computed, jobs, clock)
        for (computed, *_), of_one in kinds.items()
    )


def _seconds(
    drawn: list[Chunk],
    compared: Collection[str],
    computes: bool,
    jobs: int,
    clock: Callable[[], float],
) -> float:
    """How long the chunks will take, by the first of them."""

    def work(chunk: Chunk) -> int:
        file, path, at, nbytes = chunk
        found, expected = read_chunk(path, at, nbytes), buffer(1)[:nbytes]
        chunk_digest(found)
        file.fill(expected, at, only=compared)
        same_bytes(found, expected)
        return nbytes

    with threads(jobs, computes) as pool:
        list(pool.map(work, drawn[:jobs]))  # the first time takes imports and memory, too
        rest, begun = drawn[jobs:] or drawn, clock()
        for done in range(jobs, _MOST_ROUNDS * jobs, jobs):
            list(pool.map(work, rest[done - jobs : done]))
            if (taken := clock() - begun) > _MOST_SECONDS or done >= len(rest):
                break
    return taken * len(drawn) / min(done, len(rest))
