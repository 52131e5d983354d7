"""An estimate of how long verify takes, from a timed sample of its work."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection
from pathlib import Path

from moemerge.files import place_of
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
"""A chunk of a shard's file: the file, its path, the chunk's offset and its size in bytes."""


def seconds_to_compare(
    plan: Plan,
    out: Path,
    sources: Sources,
    compared: Collection[str],
    jobs: int,
    clock: Callable[[], float] = time.monotonic,
) -> float:
    """Estimate the seconds to read all shards and to make the tensors in `compared` again.

    Chunks are of four kinds: computed, converted, copied, and only read. A random sample of each
    kind is processed by `jobs` threads, as in the real run, so that caches, disks and cores have
    the same effect.

    Raises:
        ReadError: a source is truncated or changed.
        OSError: a shard cannot be read.
    """
    kinds: dict[tuple[bool, ...], list[Chunk]] = {}
    for shard in plan.shards:
        file = ShardFile(shard, sources)
        for at, nbytes in chunks(file.nbytes):
            pieces = file.pieces(buffer()[:nbytes], at)
            own = [tensor for tensor, _, _ in pieces if tensor and tensor.name in compared]
            computed = any(recipe.computes(tensor.recipe) for tensor in own)
            copied = all(recipe.is_copy(t.recipe, t.dtype, sources) for t in own)
            chunk = (file, place_of(out, shard.file), at, nbytes)
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
    """The seconds that all drawn chunks take, estimated from the first of them."""

    def work(chunk: Chunk) -> int:
        file, path, at, nbytes = chunk
        found, expected = read_chunk(path, at, nbytes), buffer(1)[:nbytes]
        chunk_digest(found)
        file.fill(expected, at, only=compared)
        same_bytes(found, expected)
        return nbytes

    with threads(jobs, computes) as pool:
        list(pool.map(work, drawn[:jobs]))  # not timed: the first round also imports and allocates
        rest, begun = drawn[jobs:] or drawn, clock()
        for done in range(jobs, _MOST_ROUNDS * jobs, jobs):
            list(pool.map(work, rest[done - jobs : done]))
            if (taken := clock() - begun) > _MOST_SECONDS or done >= len(rest):
                break
    return taken * len(drawn) / min(done, len(rest))
