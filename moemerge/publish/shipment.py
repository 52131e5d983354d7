"""A push during the merge: each shard is uploaded as soon as it is written, then deleted here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from moemerge.errors import RunError, VerifyError
from moemerge.files import CONFIG_FILE, place_of, read_json, write_json
from moemerge.hub import SHARD, Repository, holds
from moemerge.output import BEFORE_TUNING, Change, Manifest, State, is_whole
from moemerge.plan import INDEX_FILE, Plan, Shard
from moemerge.publish.leaving import leaving
from moemerge.version import __version__

_STARTED = "push.json"


@dataclass
class Shipment:
    """Uploads finished shards one by one, and deletes each one here when the Hub has it.

    Another thread ends the upload by setting `stopped`. `state.pushed` lists the Hub's shards.
    """

    out: Path
    repo: str
    private: bool
    state: State
    stopped: threading.Event
    _thread: threading.Thread | None = None
    _failure: list[BaseException] = field(default_factory=list)

    def goes_on(self, run: str) -> bool:
        """Whether a run with the digest `run` has already begun to push to this repository."""
        found = read_json(self.state.directory / _STARTED)
        return found == {"repo": self.repo, "run": run}

    def begin(self, plan: Plan) -> None:
        """Create the repository, and read which shards it already has.

        If another run wrote there, config.json and the index are removed: the repository then is
        no model until `finish`.

        Raises:
            RunError: the Hub or the network failed.
        """
        self.target = Repository(self.repo)
        self.target.create(self.private)
        there = self.target.files()
        if not self.goes_on(plan.run_digest):
            gone = [name for name in (CONFIG_FILE, INDEX_FILE) if name in there]
            if gone:
                self.target.commit({}, gone, "Make way for another mixture")
            data = {"repo": self.repo, "run": plan.run_digest}
            write_json(self.state.directory / _STARTED, data)
        lfs = {name: one for name, one in there.items() if one.lfs}
        self.state.pushed.update({name: (one.nbytes, one.digest) for name, one in lfs.items()})

    def send(self, shard: Shard, advance: Callable[[int], object]) -> None:
        """Wait for the upload before this one, then start to upload `shard` and return.

        `advance` is called with the shard's bytes when the upload is done.

        Raises:
            RunError, VerifyError: the upload before this one failed.
        """
        self.wait()

        def ship() -> None:
            try:
                self._ship(shard)
                advance(shard.nbytes)
            except BaseException as error:
                self._failure.append(error)

        # Not a pool's thread: Python would wait for its end after Ctrl-C.
        self._thread = threading.Thread(target=ship, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the upload under way is done.

        Raises:
            RunError, VerifyError: the upload failed.
        """
        while self._thread and self._thread.is_alive():
            self._thread.join(0.2)
            if self.stopped.is_set():
                raise RunError(f"{self.repo}: stopped")
        if self._failure:
            raise self._failure.pop()

    def finish(self, manifest: Manifest, change: Change) -> str:
        """Upload everything but shards in one commit, which makes the repository a model.

        Returns the repository's address.

        Raises:
            InputError: a text names a path of this machine.
            RunError, VerifyError: the Hub or the network failed, or a file there is not as sent.
        """
        shards = {shard.file: shard.nbytes for shard in manifest.plan.shards}
        content = {
            name: what
            for name, what in leaving(manifest, change.after).items()
            if name not in shards
        }
        there = self.target.files()
        new = {name: what for name, what in content.items() if not holds(what, there.get(name))}
        gone = stale(there, manifest.plan, self.out)
        if new or gone:
            self.target.commit(new, gone, f"A mixture made with moemerge {__version__}")
        self.target.check({**content, **shards})
        return self.target.url

    def _ship(self, shard: Shard) -> None:
        path, entry = self.out / shard.file, self.state.entry(shard)
        if not is_whole(shard, self.out, entry):
            self.state.forget(shard)
            raise VerifyError(f"{path}: changed after it was written; run the same command again")
        title = f"{shard.file}, of a mixture that is not whole yet"
        sha256 = self.target.commit({shard.file: path}, (), title, stopped=self.stopped.is_set)
        if not self.stopped.is_set():
            self.state.pushed[shard.file] = (shard.nbytes, sha256[shard.file])
            self.state.finished(shard, {**entry, "sha256": sha256[shard.file]})
            path.unlink()


def stale(there: Collection[str], plan: Plan, out: Path) -> list[str]:
    """Names in the repository to delete: an earlier mixture's shards, and files never pushed.

    Some programs would read the old shards. Of a GGUF file, they are other parts of that name.
    """
    ours = {shard.file for shard in plan.shards}
    if plan.is_gguf:
        return [n for n in there if place_of(out, n) != out / n and n not in ours]
    kept = f"{BEFORE_TUNING}/"
    return [n for n in there if (SHARD.fullmatch(n) and n not in ours) or n.startswith(kept)]
