"""The merge from a config to a finished output directory: prepare, fetch, write, finish, push."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from moemerge import output, publish
from moemerge.card import CardOptions
from moemerge.card import files as card_files
from moemerge.checkpoint import read_header
from moemerge.config import MergeConfig, as_config
from moemerge.errors import DiskFull, InputError, Line, MoemergeError, RunError
from moemerge.merging.routers import make_routers, report_of
from moemerge.options import Options, PublishOptions
from moemerge.output import (
    Change,
    FileEntry,
    How,
    Manifest,
    State,
    held,
    is_whole,
    settle,
    takes_direct,
    verify_shards,
    write_shard,
)
from moemerge.plan import ROUTERS, Plan, Shard, recipe
from moemerge.prepare import Prepared, Tensors, Transfer, check_cache_room, fetch, prepare, transfer
from moemerge.report import RoutingSummary
from moemerge.reporting import Reporter, listener, size


@dataclass(frozen=True)
class MergeResult:
    """The result of a merge: its plan, notes for the user, and the time in `seconds`.

    `written` is the bytes of shards that this run wrote. If several runs share the work, `missing`
    counts the shards that other runs still have to finish; the model is complete when it is 0.
    `routing` is the routers' report on held-out prompts (see `routing_stats.summary`), empty if the
    gate mode has none. `transfer` is the data that came from the Hub. `address` is the address of
    the pushed repository, empty if nothing was pushed.
    """

    plan: Plan
    out: Path
    notes: tuple[Line, ...]
    seconds: float
    written: int
    missing: int
    routing: RoutingSummary
    transfer: Transfer
    address: str = ""


def merge(
    config: MergeConfig | str | Path,
    out: str | Path,
    options: Options | None = None,
    reporter: Reporter | None = None,
    progress: bool = False,
) -> MergeResult:
    """Merge the models of a config into the directory `out`; an interrupted merge is continued.

    Args:
        config: a `MergeConfig`, or the path of a YAML file.
        out: a directory that does not exist, is empty, or holds a merge to continue or replace.
        options: how to run; by default `Options()`.
        reporter: receives notes and progress; by default they are dropped.
        progress: print notes and progress instead, as `Console` does.

    Raises:
        InputError: lists every problem of the config, its models and `out`; nothing was written.
        RunError: the run failed; programs do not take `out` for a model, and the same call
            continues from the finished shards.
    """
    config = as_config(config)
    options = options or Options()
    settle(Path(out))
    reporter = listener(reporter, progress)
    ready = _prepare(config, options, reporter, Path(out))
    check_cache_room(ready, options, Path(out))
    return _Merge(Path(out), options, reporter, ready).run()


class _Merge:
    def __init__(self, out: Path, options: Options, reporter: Reporter, ready: Prepared):
        self.out, self.options, self.reporter = out, options, reporter
        self.ready, self.plan, self.state = ready, ready.plan, State(out)
        self.stopped = threading.Event()
        self.shipment = _shipment(out, options, self.state, self.stopped)
        self.address = ""

    def run(self) -> MergeResult:
        try:
            return self._run()
        except BaseException:
            self.stopped.set()
            raise

    def _run(self) -> MergeResult:
        begun, options = time.monotonic(), self.options
        for note in self.ready.notes:
            self.reporter.say(note)
        shared = bool(options.shards)
        may_be_done = shared or bool(options.push and not (options.overwrite or self.shipment))
        written = missing = 0
        if not (may_be_done and output.is_finished(self.out, self.plan)):
            sources = fetch(self.ready, self.options, self.reporter)
            with held(self.out, shared) as change:
                if not (may_be_done and output.is_finished(self.out, self.plan)):
                    written, missing = self._write(sources, change)
            if shared and not missing:
                with ExitStack() as last:
                    with self._waiting("the other shares"):
                        change = last.enter_context(held(self.out, wait=True))
                    if output.is_finished(self.out, self.plan):
                        self.state.end()
                    else:
                        self._finish(sources, change)
        seconds = time.monotonic() - begun
        routing = {} if missing else output.read_manifest(self.out).routing
        hub, notes = transfer(self.ready, self.options), self.ready.notes
        if options.push and not self.shipment:
            self._push()
        return MergeResult(
            self.plan, self.out, notes, seconds, written, missing, routing, hub, self.address
        )

    def _push(self) -> None:
        repo, private = self.options.push, self.options.private
        try:
            self.address = publish.push(self.out, repo, private, self.reporter)
        except MoemergeError as error:
            command = f"moemerge push {self.out} {repo}{' --private' * private}"
            what = "; ".join(error.typed.splitlines())
            raise RunError(f"{what} ({self.out} is finished: `{command}` goes on too)") from error

    def _write(self, sources: Tensors, change: Change) -> tuple[int, int]:
        """Write the routers and this run's shards, and finish the directory unless runs share it.

        Returns the bytes written here and the number of shards that are still missing.
        """
        plan, options = self.plan, self.options
        output.begin(self.out, plan, output.file_names(plan, self.ready.carried), options)
        if self.shipment:
            self.shipment.begin(plan)
        part, parts = options.share or (0, 1)
        mine = list(plan.shards[part::parts])
        if there := sum(bool(self.state.entry(shard)) for shard in mine):
            self.reporter.say(f"going on: {there} of {len(mine)} shards are already written")
        if self.ready.gate.needs.body_pass and self._only_reads(mine):
            routers, others = mine[: part == 0], mine[part == 0 :]
            with ThreadPoolExecutor(1) as beside:  # write shards while the model runs
                try:
                    writing = beside.submit(self._write_shards, others, sources)
                    self._make_routers(sources)
                    written = writing.result()
                except BaseException:
                    self.stopped.set()
                    raise
            written += self._write_shards(routers, sources)
        else:
            self._make_routers(sources)
            written = self._write_shards(mine, sources)
        missing = sum(not self.state.entry(shard) for shard in plan.shards)
        if not options.shards:
            self._finish(sources, change)
        return written, missing

    def _make_routers(self, sources: Tensors) -> None:
        """Compute the routers, unless an earlier or parallel run has computed them."""
        with ExitStack() as mine:
            with self._waiting("the routers of another share"):
                mine.enter_context(self.state.claim("routers", wait=True))
            if not self.state.routers.exists():
                make_routers(self.ready, sources, self.options, self.reporter, self.state.routers)
        sources[ROUTERS] = read_header(self.state.routers)

    def _only_reads(self, shards: list[Shard]) -> bool:
        """Whether the shards are only copied or converted, so that the disk is the bottleneck."""
        recipes = [t.recipe for shard in shards for t in shard.tensors]
        return not self.options.ray and not any(map(recipe.computes, recipes))

    def _write_shards(self, shards: list[Shard], sources: Tensors) -> int:
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

    def _waiting(self, what: str) -> AbstractContextManager[object]:
        return self.reporter.progress(f"waiting for {what}", 1, "run")

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
            (self.out / shard.file).unlink(missing_ok=True)
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

    def _finish(self, sources: Tensors, change: Change) -> None:
        out, plan, ready = self.out, self.plan, self.ready
        files = {shard.file: self.state.entry(shard) for shard in plan.shards}
        for entry in files.values():
            entry.pop("sha256", None)
        for name, content in output.carried_content(ready.vocabulary, ready.carried):
            change.write(name, content)
            files[name] = change.entry(name)
        report = report_of(self.state.routers)
        told = CardOptions(ready.own_card, self.options.card_config is not False)
        picture = card_files.write(change, ready, report, told, self.reporter)
        if self.options.verify and not self.shipment:
            verify_shards(plan, out, sources)
        files |= {**picture, **{name: {} for name in output.OWN_FILES}}
        text, said = ready.config.as_yaml(), vars(told)
        manifest = Manifest(text, plan, files, report, ready.folder, card=said)
        if self.shipment:
            self.address = self.shipment.finish(manifest, change)
        change.finish(manifest, pushed=bool(self.shipment))


def _prepare(config: MergeConfig, options: Options, reporter: Reporter, out: Path) -> Prepared:
    """Prepare the merge, and check that it can be pushed.

    Raises:
        InputError: lists every problem of both.
    """
    if not options.push:
        return prepare(config, options, reporter, out)
    found: InputError | None = None
    fresh = False
    try:
        ready = prepare(config, options, reporter, out)
        shipment = _shipment(out, options, State(out), threading.Event())
        resumed = shipment and shipment.goes_on(ready.plan.run_digest)
        fresh = bool(shipment) and not (resumed or options.overwrite)
    except InputError as error:
        found = error
    refusals = publish.refusals(options.push, options.private, fresh)
    if problems := [*(found.problems if found else ()), *refusals]:
        raise InputError(problems)
    return ready


def _shipment(
    out: Path, options: PublishOptions, state: State, stopped: threading.Event
) -> publish.Shipment | None:
    if not options.push_as_you_go:
        return None
    return publish.Shipment(out, options.push, options.private, state, stopped)
