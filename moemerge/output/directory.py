"""The output directory: which files may be in it before a merge, and how it is made ready.

Unfinished files stand in `.moemerge/` (see `state.py`). The index and `config.json` come last,
each by an atomic rename: without them no program takes the directory for a model.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

from moemerge.checkpoint import weight_suffixes
from moemerge.errors import DiskFull, Findings, WriteError
from moemerge.files import (
    CONFIG_FILE,
    GGUF_SUFFIX,
    STATISTICS_FILE,
    WEIGHTS_SUFFIX,
    is_inside,
    place_of,
    read_json,
    shown,
)
from moemerge.options import Options, PublishOptions, WriteOptions
from moemerge.output.manifest import MANIFEST_FILE, OWN_FILES, PICTURE_FILE, read_manifest
from moemerge.output.state import STATE_DIRECTORY, State
from moemerge.plan import INDEX_FILE, Plan
from moemerge.reporting import size

MODEL_SUFFIXES = (*weight_suffixes(), ".gguf", ".index.json")


def file_names(plan: Plan, carried: Iterable[Path]) -> tuple[str, ...]:
    """Every file that a merge by this plan may write; the picture too, if routing is known."""
    shards = (shard.file for shard in plan.shards)
    others = (PICTURE_FILE, STATISTICS_FILE, *OWN_FILES)
    return (*shards, *(name.as_posix() for name in carried), *others)


def check(
    out: Path,
    plan: Plan | None,
    carried: Iterable[Path],
    sources: Iterable[Path],
    options: Options,
    findings: Findings,
    beside: int = 0,
) -> None:
    """Record every reason not to write the plan's files and the `carried` files to `out`.

    `beside` is how many bytes the merge writes there for itself, until it ends.
    """
    refusal = _unusable(out, sources) or _in_use(out, bool(options.shards))
    if refusal:
        findings.problem(str(shown(out)), *refusal)
        return
    parent = _existing(out)
    files = file_names(plan, carried) if plan else ()
    occupied = _foreign(out, files, options.overwrite) or _earlier(out, plan, options)
    writable = os.access(parent, os.W_OK)
    refusals = (
        occupied,
        None if writable else (f"{parent} cannot be written", "name a directory of your own"),
        _too_large(out, nbytes_at_once(plan, options) + beside),
    )
    for refusal in filter(None, refusals):
        findings.problem(str(shown(out)), *refusal)


_Refusal: TypeAlias = tuple[str, str] | None
"""Why an output directory cannot be written, and the fix; None if it can."""


def _existing(out: Path) -> Path:
    """The directory itself, or its nearest parent that exists."""
    resolved = out.resolve()
    return next(path for path in (resolved, *resolved.parents) if path.exists())


def _unusable(out: Path, sources: Iterable[Path]) -> _Refusal:
    """The reason why the path cannot be an output directory, whatever it contains."""
    try:
        if out.is_symlink() and not out.exists():
            return "is a link that leads nowhere", "name a directory"
        resolved, parent = out.resolve(), _existing(out)
    except OSError as error:
        return f"cannot be a directory ({error.strerror})", "name another"
    if not parent.is_dir():
        file = "is a file" if parent == resolved else f"{parent} is a file"
        return file, "name a directory"
    if any(source.resolve() == resolved for source in sources):
        return "is one of the sources", "name another directory"
    return None


def _in_use(out: Path, shared: bool) -> _Refusal:
    """Whether the directory holds another program's state, or another moemerge is at work there.

    `shared` is for one of several merges that each write some of the shards.
    """
    state = State(out)
    if state.directory.is_symlink() or not state.is_ours():
        what = f"holds a {STATE_DIRECTORY} that is not moemerge's"
        return what, "move it away, or name another directory"
    if not state.is_free(shared=shared):
        fix = "wait until it ends, or name another directory"
        return "another moemerge is writing there", fix
    return None


def _foreign(out: Path, files: Iterable[str], overwrite: bool) -> _Refusal:
    """Whether `out` holds files that moemerge did not write and must not mix with the `files`."""
    there = [p for p in (out.iterdir() if out.is_dir() else ()) if p.name != STATE_DIRECTORY]
    strangers = sorted(path.name for path in there if not any(
        name == path.name or name.startswith(f"{path.name}/") for name in _told(out)
    ))  # fmt: skip
    clash = [n for n in strangers if n in set(files) or n.endswith(MODEL_SUFFIXES)]
    ours = _listed(out)
    for name in files:
        path = place_of(out, name)
        if path != out / name and path.exists() and name not in ours:
            return "is there, and moemerge did not write it", "name another file, or move it away"
    if there and not ours and not overwrite:
        return f"is not empty ({strangers[0]})", "name a new directory"
    if clash:
        what = f"holds {clash[0]}, which moemerge did not write"
        return what, "name a new directory, or move that file away"
    if strangers and not ours:
        what = f"holds {strangers[0]} and no {MANIFEST_FILE}, so nothing there is moemerge's"
        return what, "name a new directory: --overwrite removes only what moemerge wrote"
    return None


def _earlier(out: Path, plan: Plan | None, options: Options) -> _Refusal:
    """Whether an earlier merge left a model, or a part of one, that must not be replaced."""
    if options.overwrite:
        return None
    ours, started = _listed(out), State(out).started()
    if (out / CONFIG_FILE).exists():
        goes_on = bool(options.shards or options.push) and not options.push_as_you_go
        if goes_on and plan and is_finished(out, plan):
            return None
        return "holds a finished model", "pass --overwrite to replace it"
    if started and plan and started.get("run") != plan.run_digest:
        what, fix = "of another config", "go on with that config, "
        if changed := _changed(started, plan):
            what, fix = f"that began before {' and '.join(changed)} changed", ""
        fix += "pass --overwrite to start over, or name another directory"
        return f"holds an unfinished merge {what}", fix
    if started:
        return None
    if MANIFEST_FILE in ours and not any(n.endswith((WEIGHTS_SUFFIX, GGUF_SUFFIX)) for n in ours):
        what = "holds the rest of a mixture whose shards were pushed during the merge"
        return what, "name another directory, or pass --overwrite to merge again"
    if ours:
        what = f"holds {min(ours)} of a merge that is not complete any more"
        return what, "pass --overwrite to start over"
    return None


def _too_large(out: Path, needed: int) -> _Refusal:
    """Whether `needed` bytes do not fit on the disk; files that a merge replaces count as free."""
    ours = (place_of(out, name) for name in _listed(out))
    free = shutil.disk_usage(_existing(out)).free + sum(path.stat().st_size for path in ours)
    if needed <= free:
        return None
    what = f"needs {size(needed)}, its disk has {size(free)} free"
    return what, f"free {size(needed - free)} or name a directory on another disk"


def _changed(started: dict[str, Any], plan: Plan) -> list[str]:
    """The plan's sources that changed after an unfinished merge began."""
    before, now = started.get("sources"), plan.contents
    before = before if isinstance(before, dict) else {}
    return [name for name in now.keys() & before.keys() if now[name] != before[name]]


def nbytes_at_once(plan: Plan | None, options: PublishOptions) -> int:
    """The most bytes of shards that are in the output at one time."""
    sizes = sorted(shard.nbytes for shard in plan.shards) if plan else []
    return sum(sizes[-2:] if options.push_as_you_go else sizes)


def begin(out: Path, plan: Plan, files: Iterable[str], options: WriteOptions) -> None:
    """Make `out` ready: keep the work of a run of this plan, otherwise delete the old files.

    `config.json` and the index are deleted first, so that the directory never passes for a model.
    Then only files are deleted that the manifest or an interrupted merge lists. The caller holds
    the output's lock.

    Raises:
        WriteError: `out` cannot be written.
    """
    state, files = State(out), tuple(files)
    with writing(out), state.claim("begin", wait=True):
        if options.overwrite or not state.started():
            old = _listed(out)
            state.start(plan.run_digest, {*old, *files}, plan.contents)
            for name in (CONFIG_FILE, INDEX_FILE, *old):
                place_of(out, name).unlink(missing_ok=True)
            for name in old:
                if place_of(out, name).parent != out:
                    with suppress(OSError):
                        place_of(out, name).parent.rmdir()
            if not options.shards:
                state.clear(all=True)
            state.start(plan.run_digest, files, plan.contents)
        elif not options.shards:
            state.clear(all=False)


def is_finished(out: Path, plan: Plan) -> bool:
    """Whether `out` is the finished output of this plan."""
    try:
        return (out / CONFIG_FILE).exists() and read_manifest(out).plan.digest == plan.digest
    except (OSError, ValueError):
        return False


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Raise a `WriteError` that says what to do, in place of an `OSError`."""
    try:
        yield
    except OSError as error:
        where = error.filename or out
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "free some, then run the same command again to go on"
            raise DiskFull(f"{where}: no space left; {fix}") from error
        fix = "check the path and its permissions"
        raise WriteError(f"{where}: cannot be written ({error.strerror}); {fix}") from error


def _told(out: Path) -> Iterator[str]:
    """The files that moemerge wrote or may have written: the started merge's and the manifest's."""
    for data in (State(out).started(), read_json(out / MANIFEST_FILE)):
        files = data.get("files")
        yield from filter(is_inside, files if isinstance(files, list | dict) else ())


def _listed(out: Path) -> list[str]:
    """The files of `_told` that exist."""
    return [name for name in dict.fromkeys(_told(out)) if place_of(out, name).is_file()]
