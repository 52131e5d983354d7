"""A finished directory or GGUF file pushed to the Hub: only new files, in one commit."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

from moemerge.errors import InputError, Problem
from moemerge.files import CONFIG_FILE, folder_of, place_of, shown
from moemerge.hub import Repository, holds, size_of
from moemerge.output import (
    MANIFEST_FILE,
    State,
    check_shards,
    held,
    open_manifest,
    read_manifest,
    verify_checkpoint,
)
from moemerge.plan import INDEX_FILE
from moemerge.publish.leaving import leaving, on_the_hub, stays
from moemerge.publish.permission import refusals
from moemerge.publish.shipment import stale
from moemerge.reporting import Reporter, listener, size
from moemerge.version import __version__


def push(
    out: str | Path,
    repo: str,
    private: bool = False,
    reporter: Reporter | None = None,
    progress: bool = False,
) -> str:
    """Upload a finished output to the model repository `repo` on the Hub; return its address.

    The model's files (see `leaving`) go up in one commit, without those that the Hub already has.
    Pushed files name no path of this machine. After an interrupted push, the same call sends the
    rest.

    Args:
        out: the finished output of a merge, a directory or a GGUF file.
        repo: `user/name`; created if it does not exist.
        private: whether a new repository is private.
        reporter: receives notes and progress; by default they are dropped.
        progress: print notes and progress instead, as `Console` does.

    Raises:
        InputError: the logged-in account may not write there, or `out` is not finished.
        VerifyError: a file in `out` is not what the manifest says.
        RunError: the Hub or the network failed.
    """
    out, reporter = folder_of(Path(out)), listener(reporter, progress)
    check_shards(out, open_manifest(out).plan, "push")
    if not State(out).is_free(shared=True):
        fix = "wait until it ends"
        raise InputError([Problem(str(shown(out)), "another moemerge is writing there", fix)])
    if problems := list(refusals(repo, private, out=out)):
        raise InputError(problems)
    with held(out) if os.access(out, os.W_OK) else nullcontext():
        return _push(out, repo, private, reporter)


def _push(out: Path, repo: str, private: bool, reporter: Reporter) -> str:
    verify_checkpoint(out, reporter)
    manifest = read_manifest(out)
    content = leaving(manifest, lambda name: place_of(out, name))
    written = (INDEX_FILE, CONFIG_FILE, MANIFEST_FILE)
    for name in [n for n, what in content.items() if isinstance(what, bytes) and n not in written]:
        reporter.say(f"{out / name}: is pushed without the paths of this machine in it")
    if others := stays(out, content):
        reporter.say(f"{out}: not pushed, because not of the model: {', '.join(others)}")
    content = on_the_hub(content, out)
    target = Repository(repo, bars=True)
    target.create(private)
    there = target.files()
    new = {name: what for name, what in content.items() if not holds(what, there.get(name))}
    gone = stale(there, manifest.plan, out)
    if not new and not gone:
        reporter.say(f"{repo}: nothing has changed, so nothing was sent")
        return target.url
    total = sum(map(size_of, new.values()))
    reporter.say(f"{repo}: {len(new)} of {len(content)} files are new, {size(total)}")
    with reporter.progress("uploading", total, "B") as advance:
        target.commit(new, gone, f"A mixture made with moemerge {__version__}", advance)
    target.check(content)
    return target.url
