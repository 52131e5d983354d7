"""The state of a merge, for later and parallel runs: what is finished, and which runs are active.

The output's `.moemerge/` holds `started.json` (the plan's digest and the files), the routers, an
entry for each finished shard, parts of unfinished shards, new files of `change`, and locks. The
system releases a lock when its process dies.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from moemerge.files import PART_SUFFIX, WEIGHTS_SUFFIX, place_of, read_json, write_json
from moemerge.output.manifest import FileEntry
from moemerge.plan import Shard

STATE_DIRECTORY = ".moemerge"
ROUTERS_FILE = f"routers{WEIGHTS_SUFFIX}"
ASIDE, COMMITTED = "change", "committed"
"""The folders of new files before and after a change is decided; see `change`."""
_STARTED = "started.json"
_LOCK = "lock"


class State:
    """The state directory of one output."""

    def __init__(self, out: Path):
        self.out, self.directory = out, out / STATE_DIRECTORY
        self.pushed: dict[str, tuple[int, str]] = {}  # size and sha256 of what the Hub holds

    @property
    def routers(self) -> Path:
        """The path of the routers' file; the file exists once they are computed."""
        return self.directory / ROUTERS_FILE

    @property
    def fitted(self) -> Path:
        """The path of the fitted tensors' file; the file exists once they are computed."""
        return self.directory / f"fitted{WEIGHTS_SUFFIX}"

    @property
    def kept(self) -> Path:
        """The path of the router inputs that the output keeps, if it does."""
        return self.directory / "router-inputs.safetensors"

    @property
    def texts(self) -> Path:
        """The path of the texts that experts wrote."""
        return self.directory / "texts.json"

    def started(self) -> dict[str, Any]:
        """The unfinished merge: its `run` digest, its `files`, and its `sources` at the start.

        Empty if no merge is unfinished.
        """
        return read_json(self.directory / _STARTED)

    def start(
        self, run: str, files: Iterable[str], sources: Mapping[str, Any] | None = None
    ) -> None:
        """Record that a merge begins. Call this before any other file is changed."""
        self.directory.mkdir(parents=True, exist_ok=True)
        told = {"run": run, "files": sorted(files), "sources": dict(sources or {})}
        write_json(self.directory / _STARTED, told)

    def clear(self, all: bool) -> None:
        """Remove an earlier run's unfinished parts; with `all`, also its entries and routers."""
        for path in self.directory.iterdir():
            if path.suffix == PART_SUFFIX or (all and path.name not in (_STARTED, _LOCK)):
                _remove(path)

    def end(self) -> None:
        """Remove everything but the lock, which goes when `mine` ends.

        `started.json` and the committed change go last: if the process dies here, the next run can
        still tell that the directory is moemerge's.
        """
        names = {path.name for path in self.directory.iterdir()} - {_STARTED, COMMITTED, _LOCK}
        for name in (*names, _STARTED, COMMITTED):
            _remove(self.directory / name)

    def entry(self, shard: Shard) -> FileEntry:
        """A finished shard's manifest entry; empty if the shard is neither here nor on the Hub."""
        there = place_of(self.out, shard.file).is_file() or self.is_pushed(shard)
        return cast(FileEntry, read_json(self._entry(shard)) if there else {})

    def is_pushed(self, shard: Shard) -> bool:
        """Whether the Hub holds the shard with the size and sha256 that were finished here."""
        entry = read_json(self._entry(shard)) if shard.file in self.pushed else {}
        return (entry.get("bytes"), entry.get("sha256")) == self.pushed.get(shard.file)

    def finished(self, shard: Shard, entry: FileEntry) -> None:
        """Record that a shard is finished, with its manifest entry."""
        write_json(self._entry(shard), entry)

    def forget(self, shard: Shard) -> None:
        """Record that a shard is unfinished again."""
        self._entry(shard).unlink(missing_ok=True)

    def _entry(self, shard: Shard) -> Path:
        return self.directory / f"{shard.file}.json"

    def is_ours(self) -> bool:
        """Whether moemerge may use the state directory: it is absent or holds no strange files."""
        if not self.directory.exists():
            return True
        names = {path.name for path in self.directory.iterdir()}
        return _STARTED in names or all(
            name in (_LOCK, ASIDE, COMMITTED) or name.endswith((PART_SUFFIX, ".lock"))
            for name in names
        )

    def is_free(self, shared: bool) -> bool:
        """Whether `mine` would succeed now."""
        with hold(self.directory / _LOCK, wait=False, shared=shared, create=False) as held:
            return held

    @contextmanager
    def mine(self, shared: bool, wait: bool = False) -> Iterator[bool]:
        """Lock the output, alone or with runs that share it; yields whether the lock is held.

        Afterwards the state directory is removed if only the lock is left in it.
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
        """Lock one piece of the work, such as a shard, among runs that share the output.

        Yields whether the lock is held; with `wait` it always is.
        """
        with hold(self.directory / f"{what}.lock", wait=wait) as held:
            yield held


@contextmanager
def hold(path: Path, wait: bool, shared: bool = False, create: bool = True) -> Iterator[bool]:
    """Lock a file; yields whether the lock is held. It ends when the process ends, for any reason.

    Systems without such locks (Windows) always yield True.
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
    """Lock a file and return its handle; None if there is no file or no locking system.

    Raises:
        BlockingIOError: another process holds the lock.
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
                continue  # its last holder was removing the directory
            return None
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):  # the lock of a removed file has no effect
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
