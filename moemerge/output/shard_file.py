"""A shard's file as bytes: the content at each offset, and a checksum over fixed chunks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from moemerge.output.disk import CHUNK_BYTES, buffer
from moemerge.plan import PlannedTensor, Shard, Sources, WithStatistics, arithmetic


class ShardFile:
    """The bytes of a shard's file; each byte range can be made without the rest."""

    def __init__(self, shard: Shard, sources: Sources):
        self.sources = WithStatistics(sources)
        self.header = shard.header()
        self.starts = [0]
        self.tensors: list[PlannedTensor | None] = [None]
        end = shard.header_bytes
        for start, tensor in zip(shard.starts(), shard.tensors, strict=True):
            if start > end:
                self.starts.append(end)
                self.tensors.append(None)  # zeros up to the next tensor
            self.starts.append(start)
            self.tensors.append(tensor)
            end = start + tensor.nbytes
        self.nbytes = shard.nbytes
        if self.nbytes > end:
            self.starts.append(end)
            self.tensors.append(None)

    def fill(self, view: memoryview, start: int, only: Collection[str] | None = None) -> None:
        """Fill `view` with the file's bytes from offset `start`.

        With `only`, tensors of other names are left out: their part of `view` stays as it is.

        Raises:
            ReadError: a source is truncated or changed, or a value is NaN or Inf.
        """
        for tensor, first, part in self.pieces(view, start):
            if tensor is None:
                part[:] = self.header[first : first + len(part)].ljust(len(part), b"\0")
            elif only is None or tensor.name in only:
                fill_tensor(part, first, tensor, self.sources)

    def pieces(
        self, view: memoryview, start: int
    ) -> Iterator[tuple[PlannedTensor | None, int, memoryview]]:
        """Yield the parts of the byte range that begins at `start` and has the length of `view`.

        Each part is a tensor (None for the header, and for zeros between tensors), the part's first
        byte within that tensor, and the piece of `view` for it.
        """
        at, end = bisect_right(self.starts, start) - 1, start + len(view)
        begin = start
        while begin < end:
            stop = min(self.starts[at + 1] if at + 1 < len(self.starts) else self.nbytes, end)
            part = view[begin - start : stop - start]
            gap = self.tensors[at] is None and at > 0
            yield self.tensors[at], len(self.header) if gap else begin - self.starts[at], part
            begin, at = stop, at + 1


def is_shard(path: Path, shard: Shard) -> bool:
    """Whether a file has the shard's header and size; tensors' bytes are not compared.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        found = file.read(shard.header_bytes)
    return shard.is_header(found) and path.stat().st_size == shard.nbytes


def fill_tensor(view: memoryview, start: int, tensor: PlannedTensor, sources: Sources) -> None:
    """Fill `view` with a tensor's bytes, from the tensor's byte `start`; see `arithmetic.fill`."""
    arithmetic.fill(view, start, tensor.name, tensor.shape, tensor.dtype, tensor.recipe, sources)


def chunks(nbytes: int) -> Iterator[tuple[int, int]]:
    """Each chunk of a file: its offset and its size."""
    return ((at, min(CHUNK_BYTES, nbytes - at)) for at in range(0, nbytes, CHUNK_BYTES))


def chunk_digest(chunk: memoryview) -> bytes:
    """The xxh3 of a chunk, 8 bytes."""
    import xxhash

    return xxhash.xxh3_64_digest(chunk)


def checksum(digests: Iterable[bytes]) -> str:
    """A file's checksum: the xxh3 of its chunks' digests, in the chunks' order, as hex.

    So chunks can be written and checked in any order and by any number of threads.
    """
    import xxhash

    return xxhash.xxh3_64_hexdigest(b"".join(digests))


def read_chunk(path: Path, offset: int, nbytes: int) -> memoryview:
    """Read a chunk of a file into this thread's buffer; shorter than `nbytes` at the file's end.

    Raises:
        OSError: the file cannot be read.
    """
    view = buffer()[:nbytes]
    got = 0
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while got < nbytes and (more := file.readinto(view[got:])):
            got += more
    return view[:got]


def same_bytes(one: memoryview, other: memoryview) -> bool:
    """Whether two memory views hold the same bytes.

    Python's `==` on views takes thirty times as long, and no other thread can run meanwhile.
    """
    import numpy as np

    if len(one) != len(other):
        return False
    whole = len(one) // 8 * 8
    mine, yours = (np.frombuffer(view[:whole], np.uint64) for view in (one, other))
    return np.array_equal(mine, yours) and one[whole:] == other[whole:]


def file_checksum(path: Path, jobs: int = 4) -> str:
    """The checksum of a whole file, read by `jobs` threads.

    Raises:
        OSError: the file cannot be read.
    """
    with ThreadPoolExecutor(jobs) as pool:
        stretches = chunks(path.stat().st_size)
        return checksum(pool.map(lambda at: chunk_digest(read_chunk(path, *at)), stretches))


@contextmanager
def threads(jobs: int, compute: bool) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of `jobs` threads; on an error or Ctrl-C, tasks that have not begun are dropped.

    With `compute`, torch uses one thread in each of them, because more would wait for each other.
    """
    before = 0
    if compute:
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(1)
    pool = ThreadPoolExecutor(jobs)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        if compute:
            torch.set_num_threads(before)
