"""Fast writes to disk: large aligned buffers, direct writes, byte ranges copied by the kernel.

Every fast way is tried first. Where the system refuses it, a plain write does the same, without a
message.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from functools import partial
from pathlib import Path

from moemerge.files import flush_directory

CHUNK_BYTES = 16 << 20
"""The size of a chunk, 16 MiB: one write, one digest, and one buffer of each thread."""

_ALIGNMENT = 4096
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EPERM, errno.EBADF)
_local = threading.local()


def buffer(which: int = 0) -> memoryview:
    """This thread's buffer number `which`: `CHUNK_BYTES` long, aligned to a page, and kept."""
    held = _local.__dict__.setdefault("buffers", {})
    if which not in held:
        held[which] = memoryview(mmap.mmap(-1, CHUNK_BYTES))
    view: memoryview = held[which]
    return view


class OutputFile:
    """A new file of known size, written in chunks by several threads in any order.

    With `direct`, writes go past the page cache if the file system allows it: data reaches the disk
    at once, and other files stay in the cache. The attribute `direct` says whether this is so.
    """

    def __init__(self, path: Path, nbytes: int, direct: bool, go_on: bool = False):
        """Create the file at its full size, so that a full disk is found at once.

        With `go_on`, a file of that size or more that is there stays.

        Raises:
            OSError: the file cannot be created; ENOSPC if the disk is too small.
        """
        self.path, self.nbytes = path, nbytes
        self.direct = direct and hasattr(os, "O_DIRECT")
        if go_on and path.is_file() and path.stat().st_size >= nbytes:
            return
        path.unlink(missing_ok=True)  # truncating an old file takes longer than a new one
        with path.open("xb") as file:
            if hasattr(os, "posix_fallocate"):
                try:
                    os.posix_fallocate(file.fileno(), 0, nbytes)
                except OSError as error:
                    if error.errno not in _REFUSED:
                        raise
            file.truncate(nbytes)

    def write(self, chunk: memoryview, offset: int) -> None:
        """Write a chunk at `offset`, a multiple of `CHUNK_BYTES`; directly if it is a `buffer()`.

        Raises:
            OSError: the chunk cannot be written.
        """
        whole = -(-len(chunk) // _ALIGNMENT) * _ALIGNMENT
        if self.direct and isinstance(chunk.obj, mmap.mmap):
            padded = memoryview(chunk.obj)[:whole]  # maybe past the file's end: finish() truncates
            try:
                return self._write(padded, offset, os.O_DIRECT)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                self.direct = False
        return self._write(chunk, offset, 0)

    def _write(self, data: memoryview, offset: int, flags: int) -> None:
        opener = partial(_open_with, flags)
        with open(self.path, "r+b", buffering=0, opener=opener) as file:
            file.seek(offset)
            while data:
                data = data[file.write(data) :]

    def copy_range(self, source: Path, start: int, nbytes: int, offset: int) -> bool:
        """Let the kernel copy `nbytes` of `source` (or share them); False if the kernel refuses.

        Raises:
            OSError: the copy failed for another reason.
        """
        if not hasattr(os, "copy_file_range"):
            return False
        with source.open("rb") as read, self.path.open("r+b") as write:
            while nbytes:
                try:
                    done = os.copy_file_range(read.fileno(), write.fileno(), nbytes, start, offset)
                except OSError as error:
                    if error.errno in _REFUSED:
                        return False
                    raise
                if not done:
                    return False
                start, offset, nbytes = start + done, offset + done, nbytes - done
        return True

    def finish(self, name: Path) -> None:
        """Truncate the padding, flush the file to disk, and rename it to `name`.

        Raises:
            OSError: the file cannot be written or renamed.
        """
        with self.path.open("r+b") as file:
            file.truncate(self.nbytes)
            os.fsync(file.fileno())
        self.path.replace(name)
        flush_directory(name.parent)


def takes_direct(directory: Path) -> bool:
    """Whether the file system of `directory` allows direct writes.

    Raises:
        OSError: `directory` cannot be written.
    """
    probe = directory / f".direct.{os.getpid()}.part"
    try:
        file = OutputFile(probe, _ALIGNMENT, direct=True)
        file.write(buffer()[:_ALIGNMENT], 0)
        return file.direct
    finally:
        probe.unlink(missing_ok=True)


def _open_with(more: int, path: str, flags: int) -> int:
    return os.open(path, flags | more)
