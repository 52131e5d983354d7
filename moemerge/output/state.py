"""What of a merge is finished, and who is at it: all that a later or a parallel run must know.

In the output's `.moemerge/`: `started.json` (which plan, which files), the routers, an entry for
each finished shard, parts of unfinished ones, what `change` writes aside, and locks, which the
system lets go when a process dies.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from moemerge.files import PART_SUFFIX, WEIGHTS_SUFFIX, read_json, write_json
from moemerge.output.manifest import FileEntry
from moemerge.plan import Shard

STATE_DIRECTORY = ".moemerge"
ROUTERS_FILE = f"routers{WEIGHTS_SUFFIX}"
ASIDE, COMMITTED = "change", "committed"
"""Where files that are replaced together stand before that is decided, and after."""
_STARTED = "started.json"
_LOCK = "lock"


class State:
    """The state directory of one output."""

    def __init__(self, out: Path):
        self.out, self.directory = out, out / STATE_DIRECTORY
        self.pushed: dict[str, tuple[int, str]] = {}  # size and sha256 of what the Hub holds

    @property
    def routers(self) -> Path:
        """Where the routers are once they are made."""
        return self.directory / ROUTERS_FILE

    def started(self) -> dict[str, Any]:
        """The merge that began here and has not ended: its `run` digest, its `files`, and its
        `sources` as they were; or empty."""
        return read_json(self.directory / _STARTED)

    def start(
        self, run: str, files: Iterable[str], sources: Mapping[str, Any] | None = None
    ) -> None:
        """Note that a merge begins, before it touches anything else."""
        self.directory.mkdir(parents=True, exist_ok=True)
        told = {"run": run, "files": sorted(files), "sources": dict(sources or {})}
        write_json(self.directory / _STARTED, told)

    def clear(self, all: bool) -> None:
        """Remove an earlier run's unfinished parts; with `all`, forget what it finished too."""
        for path in self.directory.iterdir():
            if path.suffix == PART_SUFFIX or (all and path.name not in (_STARTED, _LOCK)):
                _remove(path)

    def end(self) -> None:
        """Remove everything but the lock, with what tells whose it is last: dying here leaves no
        riddle. The lock goes when `mine` ends.
        """
        names = {path.name for path in self.directory.iterdir()} - {_STARTED, COMMITTED, _LOCK}
        for name in (*names, _STARTED, COMMITTED):
            _remove(self.directory / name)

    def entry(self, shard: Shard) -> FileEntry:
        """A finished shard's manifest entry; empty if it is neither here nor, as it was, pushed."""
        there = (self.out / shard.file).is_file() or self.is_pushed(shard)
        return cast(FileEntry, read_json(self._entry(shard)) if there else {})

    def is_pushed(self, shard: Shard) -> bool:
        """Whether the Hub holds the very file that was finished here."""
        entry = read_json(self._entry(shard)) if shard.file in self.pushed else {}
        return (entry.get("bytes"), entry.get("sha256")) == self.pushed.get(shard.file)

    def finished(self, shard: Shard, entry: FileEntry) -> None:
        """Note that a shard has its name and is whole."""
        write_json(self._entry(shard), entry)

    def forget(self, shard: Shard) -> None:
        """Take a shard for unfinished again."""
        self._entry(shard).unlink(missing_ok=True)

    def _entry(self, shard: Shard) -> Path:
        return self.directory / f"{shard.file}.json"

    def is_ours(self) -> bool:
        """Whether the directory is moemerge's to use: absent, or with nothing else's in it."""
        if not self.directory.exists():
            return True
        names = {path.name for path in self.directory.iterdir()}
        return _STARTED in names or all(
            name in (_LOCK, ASIDE, COMMITTED) or name.endswith((PART_SUFFIX, ".lock"))
            for name in names
        )

    def is_free(self, shared: bool) -> bool:
        """Whether `mine` would be granted now."""
        with hold(self.directory / _LOCK, wait=False, shared=shared, create=False) as held:
            return held

    @contextmanager
    def mine(self, shared: bool, wait: bool = False) -> Iterator[bool]:
        """Hold the output, alone or with runs that share it; False if somebody else has it.

        Where nothing is left in the directory afterwards, it goes.
        """
        with hold(self.directory / _LOCK, wait=wait, shared=shared) as held:
            try:
                yield held
            finally:
                if held and not shared:
                    self._tidy()

    def _tidy(self) -> None:
        with suppress(OSError):
            if [path.name for path in self.directory.iterdir()] == [_LOCK]:
                (self.directory / _LOCK).unlink()
                self.directory.rmdir()

    @contextmanager
    def claim(self, what: str, wait: bool) -> Iterator[bool]:
        """Hold one piece of the work among runs that share the output."""
        with hold(self.directory / f"{what}.lock", wait=wait) as held:
            yield held


@contextmanager
def hold(path: Path, wait: bool, shared: bool = False, create: bool = True) -> Iterator[bool]:
    """Lock a file; yields whether it is held. The lock ends with the process, however that ends.

    Where the system has no such locks (Windows), everybody gets them.
    """
    try:
        handle = _locked(path, wait, shared, create)
    except BlockingIOError:
        yield False
        return
    try:
        yield True
    finally:
        if handle is not None:
            os.close(handle)


def _locked(path: Path, wait: bool, shared: bool, create: bool) -> int | None:
    """A locked file's handle; None where there is nothing to lock.

    Raises:
        BlockingIOError: somebody else has it.
    """
    try:
        import fcntl
    except ImportError:
        fcntl = None  # type: ignore[assignment]
    while True:
        if create:
            with suppress(FileExistsError):
                path.parent.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return None
        try:
            handle = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
        except FileNotFoundError:
            if create:
                continue  # whoever had it was just removing the directory
            return None
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):  # a removed file's lock keeps nobody out
                if os.path.samestat(os.fstat(handle), path.stat()):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
