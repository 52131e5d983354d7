"""Shards written in chunks by several threads, with checksums taken on the way."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from moemerge.checkpoint import Location, check_unchanged
from moemerge.files import PART_SUFFIX
from moemerge.output.directory import writing
from moemerge.output.disk import OutputFile, buffer
from moemerge.output.manifest import FileEntry
from moemerge.output.shard_file import ShardFile, checksum, chunk_digest, chunks, threads
from moemerge.output.state import STATE_DIRECTORY
from moemerge.plan import Shard, Sources, computes, copies

_RANGE_BYTES = 256 << 20


@dataclass(frozen=True)
class How:
    """How to write shards: with `jobs` threads, `direct` writes or not, `checksums` or not."""

    jobs: int
    direct: bool = True
    checksums: bool = True


def write_shard(
    shard: Shard,
    sources: Sources,
    out: Path,
    how: How,
    advance: Callable[[int], object],
    to: Path | None = None,
) -> FileEntry:
    """Write one shard into `out`; return its manifest entry: `bytes` and, with checksums, `xxh3`.

    The memory is one buffer for each thread, whatever the shard's size. The file gets its name only
    when it is complete and flushed to disk. `advance` is called with the bytes of each step. Shards
    do not depend on each other, so they can be written in any order, at the same time, and on
    several machines. `to` is another path for the file.

    Raises:
        ReadError: a source is truncated, changed, or holds NaN or Inf.
        WriteError: the disk is full or cannot be written.
    """
    file = ShardFile(shard, sources)
    part = out / STATE_DIRECTORY / f"{shard.file}.{uuid.uuid4().hex[:8]}{PART_SUFFIX}"
    lock = threading.Lock()

    def done(nbytes: int) -> None:
        with lock:
            advance(nbytes)

    try:
        with (
            writing(out),
            threads(how.jobs, any(computes(t.recipe) for t in shard.tensors)) as pool,
        ):
            output = OutputFile(part, file.nbytes, how.direct and how.checksums)
            entry: FileEntry = {"bytes": file.nbytes}
            if how.checksums:
                entry["xxh3"] = checksum(_write_chunks(file, output, pool, done))
            else:
                _write_ranges(file, output, pool, done)
            output.finish(to or out / shard.file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return entry


def _write_chunks(
    file: ShardFile, output: OutputFile, pool: Executor, done: Callable[[int], object]
) -> Iterator[bytes]:
    """Make and write every chunk; yield the chunks' digests in order."""

    def write(chunk: tuple[int, int]) -> bytes:
        offset, nbytes = chunk
        view = buffer()[:nbytes]
        file.fill(view, offset)
        digest = chunk_digest(view)
        output.write(view, offset)
        done(nbytes)
        return digest

    return pool.map(write, chunks(file.nbytes))


def _write_ranges(
    file: ShardFile, output: OutputFile, pool: Executor, done: Callable[[int], object]
) -> None:
    """Write without checksums: the kernel copies byte ranges; only other bytes are made here."""

    def copy(piece: tuple[Location, int, int, int]) -> None:
        location, first, nbytes, offset = piece
        local = location.remote is None and not (location.negative or location.neighbours)
        start = location.offset + first
        if local and output.copy_range(location.file, start, nbytes, offset):
            check_unchanged(location)
        else:
            for at, size in chunks(nbytes):
                write((offset + at, size))
        done(nbytes)

    def write(stretch: tuple[int, int]) -> None:
        offset, nbytes = stretch
        view = buffer()[:nbytes]
        file.fill(view, offset)
        output.write(view, offset)

    copied, others = [], [(0, len(file.header))]
    for start, tensor in zip(file.starts, file.tensors, strict=True):
        if tensor is None:
            continue
        whole = copies(tensor.recipe, tensor.dtype, file.sources)
        for location in whole:
            for at in range(0, location.nbytes, _RANGE_BYTES):
                nbytes = min(_RANGE_BYTES, location.nbytes - at)
                copied.append((location, at, nbytes, start + at))
            start += location.nbytes
        if not whole:
            others += [(start + at, size) for at, size in chunks(tensor.nbytes)]
    for stretch, _ in zip(others, pool.map(write, others), strict=True):
        done(stretch[1])
    list(pool.map(copy, copied))
