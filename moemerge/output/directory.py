"""The output directory: what may be there, what is carried over, and what makes it a model.

What is unfinished stands in `.moemerge/` (see `state.py`). The index and `config.json`, without
which no program takes the directory for a model, come last, each by an atomic rename.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moemerge.checkpoint import weight_suffixes
from moemerge.errors import DiskFull, Findings, ReadError, WriteError
from moemerge.files import CONFIG_FILE, WEIGHTS_SUFFIX, is_inside, read_json
from moemerge.options import Options, PublishOptions, WriteOptions
from moemerge.output.manifest import MANIFEST_FILE, OWN_FILES, PICTURE_FILE, read_manifest
from moemerge.output.state import STATE_DIRECTORY, State
from moemerge.plan import INDEX_FILE, Plan
from moemerge.reporting import size
from moemerge.text import Vocabulary
from moemerge.tokenizer import GENERATION_FILE, TOKENIZER_FILE, portable

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
MODEL_SUFFIXES = (*weight_suffixes(), ".gguf", ".index.json")


def carried_files(vocabulary: Vocabulary, copy_tokenizer: bool) -> tuple[Path, ...]:
    """The files that go along, relative to their model: generation config and tokenizer."""
    directory, names = vocabulary.directory, [Path(GENERATION_FILE)]
    if copy_tokenizer:
        names += map(Path, TOKENIZER_FILES)
        extra = directory / "additional_chat_templates"
        names += sorted(path.relative_to(directory) for path in extra.glob("*.jinja"))
    written = vocabulary.written
    return tuple(n for n in names if n.as_posix() in written or (directory / n).is_file())


def check_carried(
    vocabulary: Vocabulary, carried: Sequence[Path], where: str, findings: Findings
) -> None:
    """Record the files to carry along that cannot be read; say what of them is changed."""
    for name in carried:
        try:
            _, notes = _content(vocabulary, name, carried)
        except OSError:
            path = vocabulary.directory / name
            findings.problem(where, f"{path} cannot be read", "check its permissions")
            continue
        for note in notes:
            findings.note(note)


def _content(
    vocabulary: Vocabulary, name: Path, carried: Sequence[Path]
) -> tuple[bytes, list[str]]:
    """What a carried file holds in the output, and what is to be said of it."""
    own = vocabulary.written.get(name.as_posix())
    content = (vocabulary.directory / name).read_bytes() if own is None else own
    rows = int(vocabulary.speaker.model.config["vocab_size"])
    return portable(name.as_posix(), content, Path(TOKENIZER_FILE) in carried, rows)


def file_names(plan: Plan, carried: Iterable[Path]) -> tuple[str, ...]:
    """Every file that a merge by this plan may write; the picture, if routing comes to be known."""
    shards = (shard.file for shard in plan.shards)
    return (*shards, *(name.as_posix() for name in carried), PICTURE_FILE, *OWN_FILES)


def check(
    out: Path,
    plan: Plan | None,
    carried: Iterable[Path],
    sources: Iterable[Path],
    options: Options,
    findings: Findings,
) -> None:
    """Record what forbids writing the plan's files, and `carried`, to `out`."""
    files = file_names(plan, carried) if plan else ()
    where = str(out)
    try:
        if out.is_symlink() and not out.exists():
            findings.problem(where, "is a link that leads nowhere", "name a directory")
            return
        resolved = out.resolve()
        parent = next(path for path in (resolved, *resolved.parents) if path.exists())
    except OSError as error:
        findings.problem(where, f"cannot be a directory ({error.strerror})", "name another")
        return
    if not parent.is_dir():
        file = "is a file" if parent == resolved else f"{parent} is a file"
        findings.problem(where, file, "name a directory")
        return
    if any(source.resolve() == resolved for source in sources):
        findings.problem(where, "is one of the sources", "name another directory")
        return
    state, ours, overwrite = State(out), set(_listed(out)), options.overwrite
    if state.directory.is_symlink() or not state.is_ours():
        what = f"holds a {STATE_DIRECTORY} that is not moemerge's"
        findings.problem(where, what, "move it away, or name another directory")
        return
    if not state.is_free(shared=bool(options.shards)):
        what = "another moemerge is writing there"
        findings.problem(where, what, "wait until it ends, or name another directory")
        return
    there = [p for p in (out.iterdir() if out.is_dir() else ()) if p.name != STATE_DIRECTORY]
    strangers = sorted(path.name for path in there if not any(
        name == path.name or name.startswith(f"{path.name}/") for name in _told(out)
    ))  # fmt: skip
    clash = [n for n in strangers if n in set(files) or n.endswith(MODEL_SUFFIXES)]
    started = state.started()
    if there and not ours and not overwrite:
        findings.problem(where, f"is not empty ({strangers[0]})", "name a new directory")
    elif clash:
        findings.problem(
            where,
            f"holds {clash[0]}, which moemerge did not write",
            "name a new directory, or move that file away",
        )
    elif strangers and not ours:
        findings.problem(
            where,
            f"holds {strangers[0]} and no {MANIFEST_FILE}, so nothing there is moemerge's",
            "name a new directory: --overwrite removes only what moemerge wrote",
        )
    elif (out / CONFIG_FILE).exists():
        goes_on = bool(options.shards or options.push) and not options.push_as_you_go
        if not overwrite and not (goes_on and plan and is_finished(out, plan)):
            findings.problem(where, "holds a finished model", "pass --overwrite to replace it")
    elif started and plan and started.get("run") != plan.run_digest and not overwrite:
        what, fix = "of another config", "go on with that config, "
        if changed := _changed(started, plan):
            what, fix = f"that began before {' and '.join(changed)} changed", ""
        findings.problem(
            where,
            f"holds an unfinished merge {what}",
            f"{fix}pass --overwrite to start over, or name another directory",
        )
    elif (
        MANIFEST_FILE in ours
        and not any(n.endswith(WEIGHTS_SUFFIX) for n in ours)
        and not (started or overwrite)
    ):
        what = "holds what is left of a mixture whose shards were pushed as it went"
        findings.problem(where, what, "name another directory, or --overwrite to make it anew")
    elif ours and not started and not overwrite:
        what = f"holds {min(ours)} of a merge that is no longer whole"
        findings.problem(where, what, "pass --overwrite to start over")
    if not os.access(parent, os.W_OK):
        findings.problem(where, f"{parent} cannot be written", "name a directory of your own")
    freed = sum((out / name).stat().st_size for name in ours if (out / name).is_file())
    free, needed = shutil.disk_usage(parent).free + freed, nbytes_at_once(plan, options)
    if needed > free:
        findings.problem(
            where,
            f"needs {size(needed)}, its disk has {size(free)} free",
            f"free {size(needed - free)} or name a directory on another disk",
        )


def _changed(started: dict[str, Any], plan: Plan) -> list[str]:
    """The plan's sources that are not what they were when an unfinished merge began."""
    before, now = started.get("sources"), plan.contents
    before = before if isinstance(before, dict) else {}
    return [name for name in now.keys() & before.keys() if now[name] != before[name]]


def nbytes_at_once(plan: Plan | None, options: PublishOptions) -> int:
    """The most bytes of shards that stand in the output together."""
    sizes = sorted(shard.nbytes for shard in plan.shards) if plan else []
    return sum(sizes[-2:] if options.push_as_you_go else sizes)


def begin(out: Path, plan: Plan, files: Iterable[str], options: WriteOptions) -> None:
    """Make `out` ready: go on where a run of this plan stopped, else clear what another left.

    When clearing, `config.json` and the index go first, so that the directory never passes for a
    model; then only files that a manifest or an interrupted merge lists. Hold the state's lock.
    """
    state, files = State(out), tuple(files)
    with writing(out), state.claim("begin", wait=True):
        if options.overwrite or not state.started():
            old = _listed(out)
            state.start(plan.run_digest, {*old, *files}, plan.contents)
            for name in (CONFIG_FILE, INDEX_FILE, *old):
                (out / name).unlink(missing_ok=True)
            for name in old:
                if (out / name).parent != out:
                    with suppress(OSError):
                        (out / name).parent.rmdir()
            if not options.shards:
                state.clear(all=True)
            state.start(plan.run_digest, files, plan.contents)
        elif not options.shards:
            state.clear(all=False)


def is_finished(out: Path, plan: Plan) -> bool:
    """Whether `out` is the finished output of this very plan."""
    try:
        return (out / CONFIG_FILE).exists() and read_manifest(out).plan.digest == plan.digest
    except (OSError, ValueError):
        return False


def carried_content(vocabulary: Vocabulary, carried: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """A model's small files by name, byte for byte but for what is added to its tokenizer and what
    a reader would trip over.

    Raises:
        ReadError: one cannot be read any more.
    """
    for name in carried:
        path = vocabulary.directory / name
        try:
            content, _ = _content(vocabulary, name, carried)
        except OSError as error:
            raise ReadError(f"{path}: cannot be read ({error.strerror})") from error
        yield name.as_posix(), content


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn what a file system says into a `WriteError` that says what to do."""
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
    """The files that moemerge wrote or may have, by the started merge's list and the manifest."""
    for data in (State(out).started(), read_json(out / MANIFEST_FILE)):
        files = data.get("files")
        yield from filter(is_inside, files if isinstance(files, list | dict) else ())


def _listed(out: Path) -> list[str]:
    """Those of them that are there."""
    return [name for name in dict.fromkeys(_told(out)) if (out / name).is_file()]
