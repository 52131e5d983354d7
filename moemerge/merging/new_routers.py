"""New routers for a finished mixture: only the first shard is written again."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from moemerge import output
from moemerge.card import CardOptions
from moemerge.card import files as card_files
from moemerge.checkpoint import read_header
from moemerge.config import MergeConfig, as_config
from moemerge.errors import InputError, Problem
from moemerge.merging.fitting import read_back
from moemerge.merging.pipeline import MergeResult
from moemerge.merging.routers import make_routers, report_of
from moemerge.options import Options, PublishOptions
from moemerge.output import (
    Change,
    FileEntry,
    How,
    Manifest,
    check_shards,
    check_sources,
    held,
    open_manifest,
    write_shard,
)
from moemerge.plan import ROUTERS, Plan
from moemerge.prepare import Prepared, fetch, prepare, transfer
from moemerge.report import RoutingSummary
from moemerge.reporting import Reporter, listener


def regate(
    out: str | Path,
    config: MergeConfig | str | Path,
    options: Options | None = None,
    reporter: Reporter | None = None,
    progress: bool = False,
) -> MergeResult:
    """Give the mixture in `out` the routers that `config` asks for.

    The config may differ from the mixture's own config in gate mode, prompts, calibration and
    experts_per_token. The first shard, manifest, card, picture and config.json are replaced
    together; a card that somebody edited stays. If the run is killed, the same call goes on.

    Args:
        out: the finished output directory of a merge.
        config: a `MergeConfig`, or the path of a YAML file.
        options: how to run; by default `Options()`.
        reporter: receives notes and progress; by default they are dropped.
        progress: print notes and progress instead, as `Console` does.

    Raises:
        InputError: `out` is no finished output, or the config asks for other weights.
        RunError: the run failed; `out` has either its old routers or its new ones.
    """
    begun, out, options = time.monotonic(), Path(out), options or Options()
    reporter = listener(reporter, progress)
    config = as_config(config)
    open_manifest(out)
    with held(out) as change:
        manifest = open_manifest(out)
        check_shards(out, manifest.plan, "regate")
        ready = _prepared(out, config, options, reporter, manifest)
        for note in ready.notes:
            reporter.say(note)
        before, after = manifest.plan.experts_per_token, ready.plan.experts_per_token
        if before != after:
            reporter.say(f"{after} experts a token, as the config says; {before} before")
        routing = _replace(change, options, reporter, ready, manifest)
    plan, seconds = ready.plan, time.monotonic() - begun
    written, hub = plan.shards[0].nbytes, transfer(ready, options)
    return MergeResult(plan, out, ready.notes, seconds, written, 0, routing, hub)


def _prepared(
    out: Path, config: MergeConfig, options: Options, reporter: Reporter, manifest: Manifest
) -> Prepared:
    """The new config's merge, prepared; its plan keeps all shards of `out` but the first."""
    # The automatic choice of a class may differ now.
    chosen = config.architecture or manifest.plan.architecture
    ready = prepare(dataclasses.replace(config, architecture=chosen), options, reporter)
    ready = dataclasses.replace(ready, config=config)
    if ready.cutting:
        what, fix = "is a split: its routers belong to its slices", "split the model again"
        raise InputError([Problem(str(out), what, fix)])
    check_sources(manifest.plan, ready.checkpoints, out)
    _check_same_weights(ready.plan, manifest.plan, out)
    shard = dataclasses.replace(ready.plan.shards[0], file=manifest.plan.shards[0].file)
    plan = dataclasses.replace(
        ready.plan,
        shards=(shard, *manifest.plan.shards[1:]),
        sources=tuple(map(manifest.plan.remembered, ready.plan.sources)),
    )
    return dataclasses.replace(ready, plan=plan)


def _replace(
    change: Change, options: Options, reporter: Reporter, ready: Prepared, manifest: Manifest
) -> RoutingSummary:
    """Make the routers and replace all files that depend on them; returns the routing report."""
    out, state, plan, config = change.out, change.state, ready.plan, ready.config
    with output.writing(out):
        if state.started().get("run") != plan.run_digest:
            state.clear(all=True)
            state.start(plan.run_digest, manifest.files)
    sources = fetch(ready, options, reporter)
    if not state.routers.exists():
        fitted, sources[ROUTERS] = read_back(ready, manifest.plan, out)
        make_routers(fitted, sources, options, reporter, state.routers)
    sources[ROUTERS] = read_header(state.routers)
    how, first = How(options.threads, options.past_the_cache, options.checksums), plan.shards[0]
    new = change.path(first.file)
    entry = write_shard(first, sources, out, how, lambda nbytes: None, new)
    report = report_of(state.routers)
    told = _told(ready, options, manifest)
    ours = output.PICTURE_FILE in manifest.files
    picture = card_files.write(change, ready, report, told, reporter, ours, manifest.fitted)
    own: dict[str, FileEntry] = {name: {} for name in output.OWN_FILES}
    files = {**manifest.files, first.file: entry}
    for name in [name for name in files if name.startswith(f"{output.BEFORE_TUNING}/")]:
        change.remove(name)  # the routers from before tuning are gone
        del files[name]
    files = {name: files[name] for name in files if name not in (output.PICTURE_FILE, *own)}
    files |= {**picture, **own}
    text, said = config.as_yaml(), vars(told)
    fits = manifest.fitted
    change.finish(Manifest(text, plan, files, report, ready.folder, card=said, fitted=fits))
    return report


def _told(ready: Prepared, options: PublishOptions, manifest: Manifest) -> CardOptions:
    """The settings of the card: from the options, otherwise from the manifest."""
    before, shown = manifest.card, options.card_config
    own = ready.own_card if options.card else str(before.get("own", ""))
    shown = bool(before.get("config", True)) if shown is None else shown
    return CardOptions(own, shown)


def _check_same_weights(new: Plan, old: Plan, out: Path) -> None:
    """Refuse a config that changes anything but routers."""

    def weights(plan: Plan) -> dict[str, tuple[object, ...]]:
        tensors = (tensor for shard in plan.shards[1:] for tensor in shard.tensors)
        return {t.name: (t.shape, t.dtype, t.recipe) for t in tensors}

    ours, theirs = weights(new), weights(old)
    if new.tied_head and not old.tied_head:  # earlier versions wrote no tied head
        del ours[new.tied_head.name]
    differ = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
    if differ:
        what = f"the config asks for other weights ({differ[0]} and {len(differ) - 1} more)"
        raise InputError([Problem(str(out), what, "regate only changes routers: merge again")])
