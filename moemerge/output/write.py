"""Shards written in chunks by several threads, with checksums taken on the way."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from moemerge.checkpoint import Location, check_unchanged
from moemerge.files import PART_SUFFIX, place_of
from moemerge.output.directory import writing
from moemerge.output.disk import OutputFile, buffer
from moemerge.output.manifest import FileEntry
from moemerge.output.shard_file import (
    ShardFile,
    checksum,
    chunk_digest,
    chunks,
    read_chunk,
    threads,
)
from moemerge.output.state import STATE_DIRECTORY
from moemerge.plan import Shard, Sources, computes, copies

_RANGE_BYTES = 256 << 20
UNFINISHED, JOURNAL = ".unfinished", ".chunks"
"""What is behind the name of a GGUF file that is being written, and of the list of its chunks."""


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
    file, state = ShardFile(shard, sources), out / STATE_DIRECTORY
    part = state / f"{shard.file}.{uuid.uuid4().hex[:8]}{PART_SUFFIX}"
    journal = None
    if shard.head and how.checksums:  # one file may be the whole model
        part = state / f"{shard.file}{UNFINISHED}"
        journal = Journal(state / f"{shard.file}{JOURNAL}", part)
    lock = threading.Lock()

    def done(nbytes: int) -> None:
        with lock:
            advance(nbytes)

    try:
        with (
            writing(out),
            threads(how.jobs, any(computes(t.recipe) for t in shard.tensors)) as pool,
        ):
            go_on = journal is not None
            output = OutputFile(part, file.nbytes, how.direct and how.checksums, go_on)
            entry: FileEntry = {"bytes": file.nbytes}
            if how.checksums:
                entry["xxh3"] = checksum(_write_chunks(file, output, pool, done, journal))
            else:
                _write_ranges(file, output, pool, done)
            output.finish(to or place_of(out, shard.file))
    except BaseException:
        if journal is None:
            part.unlink(missing_ok=True)
        raise
    if journal:
        journal.path.unlink(missing_ok=True)
    return entry


class Journal:
    """The chunks of an unfinished file that are written, for the run that goes on: the number of
    each and its digest. A chunk counts only if the file still has these bytes."""

    def __init__(self, path: Path, part: Path):
        self.path, self.part, self.lock = path, part, threading.Lock()
        self.known: dict[int, bytes] = {}
        if path.is_file() and part.is_file():
            content = path.read_bytes()
            for at in range(0, len(content) // 16 * 16, 16):
                number = int.from_bytes(content[at : at + 8], "little")
                self.known[number] = content[at + 8 : at + 16]
        else:
            path.unlink(missing_ok=True)

    def has(self, offset: int, nbytes: int) -> bytes:
        """The digest of a chunk that is there; empty if it is not."""
        digest = self.known.get(offset, b"")
        if digest and chunk_digest(read_chunk(self.part, offset, nbytes)) == digest:
            return digest
        return b""

    def note(self, offset: int, digest: bytes) -> None:
        """Note a chunk that was written."""
        with self.lock, self.path.open("ab") as file:
            file.write(offset.to_bytes(8, "little") + digest)


def _write_chunks(
    file: ShardFile,
    output: OutputFile,
    pool: Executor,
    done: Callable[[int], object],
    journal: Journal | None,
) -> Iterator[bytes]:
    """Make and write every chunk; yield the chunks' digests in order."""

    def write(chunk: tuple[int, int]) -> bytes:
        offset, nbytes = chunk
        if journal and (there := journal.has(offset, nbytes)):
            done(nbytes)
            return there
        view = buffer()[:nbytes]
        file.fill(view, offset)
        digest = chunk_digest(view)
        output.write(view, offset)
        if journal:
            journal.note(offset, digest)
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
