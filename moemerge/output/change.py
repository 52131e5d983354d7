"""Files of an output replaced together, or none of them; and the output held meanwhile.

New files are written aside, in `.moemerge/change/`. One rename of that directory, to
`.moemerge/committed/`, decides: before it nothing has changed, after it everything has, for whoever
holds or reads the output next moves the files that have not been moved yet.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from moemerge.errors import RunError
from moemerge.files import CONFIG_FILE, as_json, flush_directory, is_inside, read_json, write_json
from moemerge.output.directory import writing
from moemerge.output.manifest import MANIFEST_FILE, FileEntry, Manifest
from moemerge.output.shard_file import file_checksum
from moemerge.output.state import ASIDE, COMMITTED, State
from moemerge.plan import INDEX_FILE, weight_index

_STEPS = "steps.json"
_FILES = "files"
_LAST = (INDEX_FILE, CONFIG_FILE)
"""What makes a directory a model comes last, in this order."""


class Change:
    """New files of an output, and names that go, until `commit` puts them in place together."""

    def __init__(self, out: Path):
        self.out, self.state = out, State(out)
        self._aside = self.state.directory / ASIDE
        self._gone: list[str] = []

    def path(self, name: str) -> Path:
        """Where the new file of that name is to be written."""
        path = self._aside / _FILES / name
        with writing(self.out):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, name: str, content: bytes) -> None:
        """Write the new file of that name."""
        path = self.path(name)
        with writing(self.out):
            path.write_bytes(content)

    def write_json(self, name: str, data: object) -> None:
        """Write the new file of that name as JSON."""
        self.write(name, as_json(data).encode())

    def remove(self, name: str) -> None:
        """Let the file of that name go, if there is one."""
        self._gone.append(name)

    def after(self, name: str) -> Path:
        """Where the file now lies that will have that name."""
        path = self._aside / _FILES / name
        return path if path.is_file() else self.out / name

    def entry(self, name: str) -> FileEntry:
        """What the manifest says of the file that will have that name."""
        path = self.after(name)
        return {"bytes": path.stat().st_size, "xxh3": file_checksum(path)}

    def finish(self, manifest: Manifest, pushed: bool = False) -> None:
        """Commit, with the manifest, the index and config.json that make it a model.

        Where its shards have been `pushed` and are gone, the manifest is all.
        """
        files = {MANIFEST_FILE: manifest.to_json()}
        if not pushed:
            files |= {INDEX_FILE: weight_index(manifest.plan), CONFIG_FILE: manifest.plan.config}
        for name, data in files.items():
            self.write_json(name, data)
        self.commit()

    def commit(self) -> None:
        """Put everything in place. The work is then done: the rest of `.moemerge/` goes too.

        Raises:
            WriteError: it cannot be; the next to hold or read the output tries again.
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
    """Hold an output, alone or with runs that share it; what a killed run had decided comes first.

    What is decided on must be read while it is held.

    Raises:
        RunError: another run has it.
        WriteError: it cannot be written.
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
    """Complete what a killed run had decided; whoever reads an output calls this first.

    Raises:
        RunError: another run is just at it.
        WriteError: it cannot be completed here.
    """
    if os.path.isdir(State(out).directory / COMMITTED):  # noqa: PTH112 (it raises nothing)
        with held(out):
            pass


def _complete(state: State) -> None:
    """Move what is committed to its place. Whoever dies here leaves it to be done again."""
    committed = state.directory / COMMITTED
    if not committed.is_dir():
        return
    steps = read_json(committed / _STEPS)
    folders = set()
    for name in filter(is_inside, steps.get("files", ())):
        new, path = committed / _FILES / name, state.out / name
        folders.add(path.parent)
        if new.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            new.replace(path)
    for name in filter(is_inside, steps.get("gone", ())):
        path = state.out / name
        folders.add(path.parent)
        path.unlink(missing_ok=True)
        if path.parent != state.out:
            with suppress(OSError):
                path.parent.rmdir()
    for folder in folders:
        flush_directory(folder)
    state.end()


def _discard(state: State) -> None:
    """Remove what was written aside and never committed."""
    if (state.directory / ASIDE).exists():
        shutil.rmtree(state.directory / ASIDE)


def _flush(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())
