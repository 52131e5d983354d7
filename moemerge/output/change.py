"""Several files of an output replaced together or not at all, while the output is locked.

New files are first written to `.moemerge/change/`. Then that directory is renamed to
`.moemerge/committed/`: before the rename nothing has changed, after it the change is decided. If a
run is killed while it moves the files to their places, the next run that locks or reads the output
moves the rest.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from moemerge.errors import RunError
from moemerge.files import (
    CONFIG_FILE,
    as_json,
    flush_directory,
    is_inside,
    place_of,
    read_json,
    write_json,
)
from moemerge.output.directory import writing
from moemerge.output.manifest import MANIFEST_FILE, FileEntry, Manifest
from moemerge.output.shard_file import file_checksum
from moemerge.output.state import ASIDE, COMMITTED, State
from moemerge.plan import INDEX_FILE, weight_index

_STEPS = "steps.json"
_FILES = "files"
_LAST = (INDEX_FILE, CONFIG_FILE)
"""Moved last, in this order, because they make a directory a model."""


class Change:
    """New files of an output and names to delete, collected until `commit` applies them."""

    def __init__(self, out: Path):
        self.out, self.state = out, State(out)
        self._aside = self.state.directory / ASIDE
        self._gone: list[str] = []

    def path(self, name: str) -> Path:
        """The path at which to write the new file `name`."""
        path = self._aside / _FILES / name
        with writing(self.out):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, name: str, content: bytes) -> None:
        """Write the new file `name`."""
        path = self.path(name)
        with writing(self.out):
            path.write_bytes(content)

    def write_json(self, name: str, data: object) -> None:
        """Write the new file `name` as JSON."""
        self.write(name, as_json(data).encode())

    def remove(self, name: str) -> None:
        """Delete the file `name` at the commit, if it exists."""
        self._gone.append(name)

    def after(self, name: str) -> Path:
        """The path of the file that is `name` after the commit: the new one, or the present one."""
        path = self._aside / _FILES / name
        return path if path.is_file() else place_of(self.out, name)

    def entry(self, name: str) -> FileEntry:
        """The manifest entry of the file that is `name` after the commit: bytes and xxh3."""
        path = self.after(name)
        return {"bytes": path.stat().st_size, "xxh3": file_checksum(path)}

    def finish(self, manifest: Manifest, pushed: bool = False) -> None:
        """Add the manifest, the index and config.json, then commit.

        If the shards were `pushed` and deleted here, only the manifest is added: without its shards
        the directory is no model.
        """
        files = {MANIFEST_FILE: manifest.to_json()}
        if not pushed:
            files |= {CONFIG_FILE: manifest.plan.config}
            if not manifest.plan.is_gguf:
                files |= {INDEX_FILE: weight_index(manifest.plan)}
        for name, data in files.items():
            self.write_json(name, data)
        self.commit()

    def commit(self) -> None:
        """Move all new files to their places, and remove what else is in `.moemerge/`.

        Raises:
            WriteError: a file cannot be written or moved. If the change was decided before, the
                next run that locks or reads the output completes it.
        """
        root = self._aside / _FILES
        with writing(self.out):
            root.mkdir(parents=True, exist_ok=True)
            files = [path for path in sorted(root.rglob("*")) if path.is_file()]
            for path in files:
                _flush(path)
            for folder in {path.parent for path in files}:
                flush_directory(folder)
            names = [path.relative_to(root).as_posix() for path in files]
            names.sort(key=lambda name: _LAST.index(name) if name in _LAST else -1)
            write_json(self._aside / _STEPS, {"files": names, "gone": self._gone})
            self._aside.rename(self.state.directory / COMMITTED)
            flush_directory(self.state.directory)
            _complete(self.state)


@contextmanager
def held(out: Path, shared: bool = False, wait: bool = False) -> Iterator[Change]:
    """Lock an output; with `shared`, together with other runs that share the work.

    A change that a killed run had decided is completed first. Read the files that a decision
    depends on only after this call, because another run may have changed them before.

    Raises:
        RunError: another run holds the lock.
        WriteError: the output cannot be written.
    """
    state = State(out)
    with ExitStack() as stack:
        with writing(out):
            if not stack.enter_context(state.mine(shared, wait)):
                raise RunError(f"{out}: another moemerge is at work there; wait for it")
            if not shared:
                _complete(state)
                _discard(state)
        try:
            yield Change(out)
        finally:
            if not shared:
                with suppress(OSError):
                    _discard(state)


def settle(out: Path) -> None:
    """Complete a change that a killed run had decided. Call this before you read an output.

    Raises:
        RunError: another run is completing the change now.
        WriteError: the output cannot be written.
    """
    if os.path.isdir(State(out).directory / COMMITTED):  # noqa: PTH112 (os.path.isdir never raises)
        with held(out):
            pass


def _complete(state: State) -> None:
    """Move committed files to their places. If the process dies here, the next run repeats this."""
    committed = state.directory / COMMITTED
    if not committed.is_dir():
        return
    steps = read_json(committed / _STEPS)
    folders = set()
    for name in filter(is_inside, steps.get("files", ())):
        new, path = committed / _FILES / name, place_of(state.out, name)
        folders.add(path.parent)
        if new.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            new.replace(path)
    for name in filter(is_inside, steps.get("gone", ())):
        path = place_of(state.out, name)
        folders.add(path.parent)
        path.unlink(missing_ok=True)
        if path.parent != state.out:
            with suppress(OSError):
                path.parent.rmdir()
    for folder in folders:
        flush_directory(folder)
    state.end()


def _discard(state: State) -> None:
    """Remove new files that were never committed."""
    if (state.directory / ASIDE).exists():
        shutil.rmtree(state.directory / ASIDE)


def _flush(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())
