"""The disk's narrow door: large aligned buffers, direct writes, ranges copied within the kernel.

Everything here has a plain path that works anywhere; the fast ones are tried and given up quietly.
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
"""What is written at once, and what a checksum is taken over: one buffer of each thread."""

_ALIGNMENT = 4096
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EPERM, errno.EBADF)
_local = threading.local()


def buffer(which: int = 0) -> memoryview:
    """This thread's aligned buffer of `CHUNK_BYTES`, kept; a second one under another number."""
    held = _local.__dict__.setdefault("buffers", {})
    if which not in held:
        held[which] = memoryview(mmap.mmap(-1, CHUNK_BYTES))
    view: memoryview = held[which]
    return view


class OutputFile:
    """A new file of known size, written in chunks by several threads in any order.

    With `direct`, past the page cache where the file system takes it: the data is on its way to the
    disk at once, and nothing else is pushed out of memory. `direct` afterwards says what it was.
    """

    def __init__(self, path: Path, nbytes: int, direct: bool):
        """Create the file at its full size, so that a disk too small is found at once.

        Raises:
            OSError: it cannot be made; ENOSPC if the disk is too small.
        """
        self.path, self.nbytes = path, nbytes
        self.direct = direct and hasattr(os, "O_DIRECT")
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
        """Write a chunk that lies in an aligned `buffer()`, at a multiple of `CHUNK_BYTES`."""
        whole = -(-len(chunk) // _ALIGNMENT) * _ALIGNMENT
        if self.direct and isinstance(chunk.obj, mmap.mmap):
            padded = memoryview(chunk.obj)[:whole]  # beyond the end; finish() cuts it off
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
        """Let the kernel copy (or share, where the file system can); False if it will not."""
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
        """Cut the padding off, flush everything to the disk, and give the file its name."""
        with self.path.open("r+b") as file:
            file.truncate(self.nbytes)
            os.fsync(file.fileno())
        self.path.replace(name)
        flush_directory(name.parent)


def takes_direct(directory: Path) -> bool:
    """Whether the file system of `directory` takes direct writes."""
    probe = directory / f".direct.{os.getpid()}.part"
    try:
        file = OutputFile(probe, _ALIGNMENT, direct=True)
        file.write(buffer()[:_ALIGNMENT], 0)
        return file.direct
    finally:
        probe.unlink(missing_ok=True)


def _open_with(more: int, path: str, flags: int) -> int:
    return os.open(path, flags | more)
