"""The shard loop: write, check and send the shards that one run has to write."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from moemerge import output, publish
from moemerge.errors import DiskFull, Line, RunError
from moemerge.files import place_of
from moemerge.options import Options
from moemerge.output import (
    FileEntry,
    How,
    State,
    is_whole,
    takes_direct,
    verify_shards,
    write_shard,
)
from moemerge.plan import Plan, Shard
from moemerge.prepare import Tensors
from moemerge.reporting import Reporter, size


class ShardLoop:
    """Writes shards of a plan to the directory `out`, and skips those that are finished.

    Runs that share a merge claim each shard before they write it. With a `shipment`, each finished
    shard is uploaded and then deleted. Setting `stopped` ends the loop with a `RunError`.
    """

    def __init__(
        self,
        plan: Plan,
        out: Path,
        options: Options,
        reporter: Reporter,
        state: State,
        shipment: publish.Shipment | None,
        stopped: threading.Event,
    ):
        self.plan, self.out, self.options, self.reporter = plan, out, options, reporter
        self.state, self.shipment, self.stopped = state, shipment, stopped

    def write(self, shards: list[Shard], sources: Tensors) -> int:
        """Write the shards that are missing; returns the bytes written."""
        there = [shard for shard in shards if self.state.entry(shard)]
        with ExitStack() as bars:
            advance = self._bar(bars, "checking finished shards", there)
            todo = []
            for shard in shards:
                if not self._is_done(shard):
                    todo.append(shard)
                if shard in there:
                    advance(shard.nbytes)
        how, leaving = self._how(), [s for s in shards if not self.state.is_pushed(s)]
        with ExitStack() as bars:
            advance = self._bar(bars, "writing", todo)
            self.sent = self._bar(bars, "uploading", leaving) if self.shipment else advance

            def step(nbytes: int) -> None:
                if self.stopped.is_set():
                    raise RunError(f"{self.out}: stopped")
                advance(nbytes)

            if self.options.ray:
                from moemerge.output import write_shards

                for shard, entry in write_shards(todo, sources, self.out, how, self.options.ray):
                    step(shard.nbytes)
                    self._done(shard, entry)
                return sum(shard.nbytes for shard in todo)
            for shard in leaving if self.shipment else ():
                if shard not in todo:
                    self._send(shard, sources)
            written = sum(self._write_claimed(todo, sources, how, step))
            if self.shipment:
                self.shipment.wait()
            return written

    def _bar(self, bars: ExitStack, what: str, shards: list[Shard]) -> Callable[[int], object]:
        total = sum(shard.nbytes for shard in shards)
        return bars.enter_context(self.reporter.progress(what, total, "B"))

    def _send(self, shard: Shard, sources: Tensors) -> None:
        """Start the upload of a finished shard, if shards are pushed during the merge."""
        if self.shipment:
            if self.options.verify:
                verify_shards(self.plan, self.out, sources, [shard])
            self.shipment.send(shard, self.sent)

    def _how(self) -> How:
        options, say = self.options, self.reporter.say
        with output.writing(self.out):
            direct = options.past_the_cache and takes_direct(self.state.directory)
        if options.direct and not (direct and options.checksums):
            why = "--no-checksum lets the kernel copy" if direct else "the file system refuses it"
            say(Line(f"--direct has no effect: {why}"))
        self.reporter.detail(f"{options.threads} threads, {'direct' if direct else 'plain'} writes")
        return How(options.threads, direct, options.checksums)

    def _write_claimed(
        self, todo: list[Shard], sources: Tensors, how: How, advance: Callable[[int], object]
    ) -> Iterator[int]:
        for shard in todo:
            with self.state.claim(shard.file, wait=False) as mine:
                if mine and not self.state.entry(shard):
                    try:
                        entry = write_shard(shard, sources, self.out, how, advance)
                    except DiskFull as error:
                        raise self._missing_space() from error
                    self._done(shard, entry)
                    self._send(shard, sources)
                    yield shard.nbytes

    def _missing_space(self) -> DiskFull:
        left = [shard for shard in self.plan.shards if not self.state.entry(shard)]
        sizes = sorted(shard.nbytes for shard in left)
        needed = sum(sizes[-2:] if self.shipment else sizes) - shutil.disk_usage(self.out).free
        return DiskFull(
            f"{self.out}: the disk is full, {len(left)} shards are still to come; free "
            f"{size(max(needed, 0))}, then run the same command again to go on"
        )

    def _is_done(self, shard: Shard) -> bool:
        """Whether an earlier run finished the shard and the file is unchanged."""
        entry = self.state.entry(shard)
        if self.state.is_pushed(shard):
            place_of(self.out, shard.file).unlink(missing_ok=True)
            return True
        if entry and not is_whole(shard, self.out, entry):
            self.state.forget(shard)
            return False
        return bool(entry)

    def _done(self, shard: Shard, entry: FileEntry) -> None:
        with output.writing(self.out):
            self.state.finished(shard, entry)
        digest = f", xxh3 {entry['xxh3']}" if "xxh3" in entry else ""
        self.reporter.detail(f"{shard.file}: {size(shard.nbytes)}{digest}")
