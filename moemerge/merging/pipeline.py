"""The merge from a config to a finished output directory: prepare, fetch, write, finish, push."""

from __future__ import annotations

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from moemerge import output, publish
from moemerge.card import CardOptions
from moemerge.card import files as card_files
from moemerge.checkpoint import read_header
from moemerge.config import MergeConfig, as_config
from moemerge.errors import InputError, Line, MoemergeError, RunError
from moemerge.files import STATISTICS_FILE, folder_of, shown
from moemerge.merging.fitting import fit_report, make_fit, written_texts
from moemerge.merging.routers import make_routers, report_of
from moemerge.merging.shard_loop import ShardLoop
from moemerge.options import Options, PublishOptions
from moemerge.output import (
    Change,
    Manifest,
    State,
    held,
    settle,
    verify_shards,
)
from moemerge.plan import ROUTERS, Plan, Shard, recipe
from moemerge.prepare import Prepared, Tensors, Transfer, check_cache_room, fetch, prepare, transfer
from moemerge.report import FitSummary, RoutingSummary
from moemerge.reporting import Reporter, listener


@dataclass(frozen=True)
class MergeResult:
    """The result of a merge: its plan, notes for the user, and the time in `seconds`.

    `written` is the bytes of shards that this run wrote. If several runs share the work, `missing`
    counts the shards that other runs still have to finish; the model is complete when it is 0.
    `routing` is the routers' report on held-out prompts (see `routing_stats.summary`), empty if the
    gate mode has none, and `fitted` that of the fit of body and experts. `transfer` is the data
    that came from the Hub. `address` is the address of the pushed repository, empty if nothing was
    pushed.
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
    fitted: FitSummary = field(default_factory=lambda: FitSummary())


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
    config, out = as_config(config), folder_of(Path(out))
    options = options or Options()
    settle(out)
    reporter = listener(reporter, progress)
    ready = _prepare(config, options, reporter, out)
    check_cache_room(ready, options, out)
    return _Merge(out, options, reporter, ready).run()


class _Merge:
    def __init__(self, out: Path, options: Options, reporter: Reporter, ready: Prepared):
        self.out, self.options, self.reporter = out, options, reporter
        self.ready, self.plan, self.state = ready, ready.plan, State(out)
        self.stopped = threading.Event()
        self.shipment = _shipment(out, options, self.state, self.stopped)
        self.loop = ShardLoop(
            self.plan, out, options, reporter, self.state, self.shipment, self.stopped
        )
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
        done = None if missing else output.read_manifest(self.out)
        hub, notes = transfer(self.ready, self.options), self.ready.notes
        if options.push and not self.shipment:
            self._push()
        return MergeResult(
            self.plan, self.out, notes, seconds, written, missing,
            done.routing if done else {}, hub, self.address, done.fitted if done else {},
        )  # fmt: skip

    def _push(self) -> None:
        repo, private, out = self.options.push, self.options.private, shown(self.out)
        try:
            self.address = publish.push(self.out, repo, private, self.reporter)
        except MoemergeError as error:
            command = f"moemerge push {out} {repo}{' --private' * private}"
            what = "; ".join(error.typed.splitlines())
            raise RunError(f"{what} ({out} is finished: `{command}` goes on too)") from error

    def _write(self, sources: Tensors, change: Change) -> tuple[int, int]:
        """Write the routers and this run's shards, and finish the directory unless runs share it.

        Returns the bytes written here and the number of shards that are still missing.
        """
        plan, options = self.plan, self.options
        output.begin(self.out, plan, output.file_names(plan, self.ready.carried), options)
        if self.shipment:
            self.shipment.begin(plan)
        self._make_fit(sources)
        part, parts = options.share or (0, 1)
        mine = list(plan.shards[part::parts])
        if there := sum(bool(self.state.entry(shard)) for shard in mine):
            self.reporter.say(f"going on: {there} of {len(mine)} shards are already written")
        if self.ready.gate.needs.body_pass and self._only_reads(mine):
            routers, others = mine[: part == 0], mine[part == 0 :]
            with ThreadPoolExecutor(1) as beside:  # write shards while the model runs
                try:
                    writing = beside.submit(self.loop.write, others, sources)
                    self._make_routers(sources)
                    written = writing.result()
                except BaseException:
                    self.stopped.set()
                    raise
            written += self.loop.write(routers, sources)
        else:
            self._make_routers(sources)
            written = self.loop.write(mine, sources)
        missing = sum(not self.state.entry(shard) for shard in plan.shards)
        if not options.shards:
            self._finish(sources, change)
        return written, missing

    def _make_fit(self, sources: Tensors) -> None:
        """Fit body and experts, unless an earlier or parallel run has done it."""
        state = self.state
        if self.ready.fit is None:
            return
        with ExitStack() as mine:
            with self._waiting("the fit of another share"):
                mine.enter_context(state.claim("fitted", wait=True))
            if not state.fitted.exists():
                make_fit(self.ready, sources, self.options, self.reporter, state)
        sources[ROUTERS] = read_header(state.fitted)

    def _make_routers(self, sources: Tensors) -> None:
        """Compute the routers, unless an earlier or parallel run has computed them."""
        with ExitStack() as mine:
            with self._waiting("the routers of another share"):
                mine.enter_context(self.state.claim("routers", wait=True))
            if not self.state.routers.exists():
                given = self.ready, sources, self.options, self.reporter
                written = written_texts(*given, self.state)
                kept = self.state.kept if self.options.statistics else None
                make_routers(*given, self.state.routers, written, kept)
        sources[ROUTERS] = {**sources.get(ROUTERS, {}), **read_header(self.state.routers)}

    def _only_reads(self, shards: list[Shard]) -> bool:
        """Whether the shards are only copied or converted, so that the disk is the bottleneck."""
        recipes = [t.recipe for shard in shards for t in shard.tensors]
        return not self.options.ray and not any(map(recipe.computes, recipes))

    def _waiting(self, what: str) -> AbstractContextManager[object]:
        return self.reporter.progress(f"waiting for {what}", 1, "run")

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
        fitted = fit_report(ready, self.state.fitted)
        picture = card_files.write(change, ready, report, told, self.reporter, fitted=fitted)
        if self.state.kept.exists():
            with output.writing(out):
                shutil.copyfile(self.state.kept, change.path(STATISTICS_FILE))
            files[STATISTICS_FILE] = change.entry(STATISTICS_FILE)
        if self.options.verify and not self.shipment:
            verify_shards(plan, out, sources)
        files |= {**picture, **{name: {} for name in output.OWN_FILES}}
        text, said = ready.config.as_yaml(), vars(told)
        manifest = Manifest(text, plan, files, report, ready.folder, card=said, fitted=fitted)
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
    refusals = publish.refusals(options.push, options.private, fresh, out)
    if problems := [*(found.problems if found else ()), *refusals]:
        raise InputError(problems)
    return ready


def _shipment(
    out: Path, options: PublishOptions, state: State, stopped: threading.Event
) -> publish.Shipment | None:
    if not options.push_as_you_go:
        return None
    return publish.Shipment(out, options.push, options.private, state, stopped)
