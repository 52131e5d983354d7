"""A push while it is being merged: each shard leaves as soon as it is written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from moemerge.errors import RunError, VerifyError
from moemerge.files import CONFIG_FILE, read_json, write_json
from moemerge.hub import SHARD, Repository, holds
from moemerge.output import BEFORE_TUNING, Change, Manifest, State, is_whole
from moemerge.plan import INDEX_FILE, Plan, Shard
from moemerge.publish.leaving import leaving
from moemerge.version import __version__

_STARTED = "push.json"


@dataclass
class Shipment:
    """Shards that go to the Hub one by one, as they are finished, and are then deleted here.

    `stopped` ends it from another thread. `State.pushed` is what the Hub holds.
    """

    out: Path
    repo: str
    private: bool
    state: State
    stopped: threading.Event
    _thread: threading.Thread | None = None
    _failure: list[BaseException] = field(default_factory=list)

    def goes_on(self, run: str) -> bool:
        """Whether the run of this digest has begun to push to this repository."""
        found = read_json(self.state.directory / _STARTED)
        return found == {"repo": self.repo, "run": run}

    def begin(self, plan: Plan) -> None:
        """Make the repository no model and learn which shards it has."""
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
        """Let a finished shard leave once the one before it has; wait for that, not for this.

        Raises:
            RunError, VerifyError: the one before it did not arrive.
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
        """Wait until the shard on its way has arrived.

        Raises:
            RunError, VerifyError: it did not.
        """
        while self._thread and self._thread.is_alive():
            self._thread.join(0.2)
            if self.stopped.is_set():
                raise RunError(f"{self.repo}: stopped")
        if self._failure:
            raise self._failure.pop()

    def finish(self, manifest: Manifest, change: Change) -> str:
        """Everything but shards, in the commit that makes the repository a model; its address."""
        shards = {shard.file: shard.nbytes for shard in manifest.plan.shards}
        content = {
            name: what
            for name, what in leaving(manifest, change.after).items()
            if name not in shards
        }
        there = self.target.files()
        new = {name: what for name, what in content.items() if not holds(what, there.get(name))}
        gone = stale(there, manifest.plan)
        if new or gone:
            self.target.commit(new, gone, f"A mixture made with moemerge {__version__}")
        self.target.check({**content, **shards})
        return self.target.url

    def _ship(self, shard: Shard) -> None:
        path, entry = self.out / shard.file, self.state.entry(shard)
        if not is_whole(shard, self.out, entry):
            self.state.forget(shard)
            raise VerifyError(f"{path}: is not what was written; run the same command again")
        title = f"{shard.file}, of a mixture that is not whole yet"
        sha256 = self.target.commit({shard.file: path}, (), title, stopped=self.stopped.is_set)
        if not self.stopped.is_set():
            self.state.pushed[shard.file] = (shard.nbytes, sha256[shard.file])
            self.state.finished(shard, {**entry, "sha256": sha256[shard.file]})
            path.unlink()


def stale(there: Collection[str], plan: Plan) -> list[str]:
    """Shards of an earlier mixture, which some programs would read, and what never should leave."""
    ours = {shard.file for shard in plan.shards}
    kept = f"{BEFORE_TUNING}/"
    return [n for n in there if (SHARD.fullmatch(n) and n not in ours) or n.startswith(kept)]
