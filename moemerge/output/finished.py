"""A finished output opened: its manifest, and its sources if they are still the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moemerge.checkpoint import (
    Checkpoint,
    Location,
    Reference,
    SourceProblem,
    nearest_directory,
    open_checkpoint,
    parse_source,
    with_rows,
)
from moemerge.errors import InputError, Problem, VerifyError
from moemerge.files import CONFIG_FILE, place_of, shown
from moemerge.output.change import settle
from moemerge.output.manifest import MANIFEST_FILE, Manifest, read_manifest
from moemerge.plan import Plan, Source, recipe
from moemerge.reporting import Reporter


def check_shards(out: Path, plan: Plan, action: str) -> None:
    """Refuse a directory that is not finished, or that lost its shards when they were pushed.

    `action` is the command for the message, such as `verify`.

    Raises:
        InputError: config.json or the shards are missing.
    """
    if (out / CONFIG_FILE).exists():
        return
    what, fix = f"holds no {CONFIG_FILE}: it is not finished", "merge again, or copy it again"
    if not any(place_of(out, shard.file).exists() for shard in plan.shards):
        what = "holds no shards"
        fix = f"if they were pushed during the merge, {action} a downloaded copy"
    raise InputError([Problem(str(out), what, fix)])


def manifest_of(out: Path, action: str) -> Manifest | None:
    """The manifest of a mixture; None if moemerge did not make the mixture.

    Raises:
        InputError: the shards are missing.
        VerifyError: the manifest is broken.
    """
    settle(out)
    if not (out / MANIFEST_FILE).exists():
        return None
    manifest = open_manifest(out)
    check_shards(out, manifest.plan, action)
    return manifest


def open_manifest(out: Path) -> Manifest:
    """The manifest of a finished directory; a change that a killed run decided is completed first.

    Raises:
        InputError: the directory is not a finished output of moemerge.
        VerifyError: the manifest is broken.
    """
    settle(out)
    try:
        return read_manifest(out)
    except (FileNotFoundError, NotADirectoryError) as error:
        near = "" if out.exists() or shown(out) != out else nearest_directory(str(out), None)
        what, fix = f"holds no {MANIFEST_FILE}", near or "name a directory that moemerge finished"
        if shown(out) != out:
            what, fix = (
                f"there is no {out.name} beside it, which tells what it holds",
                "merge again",
            )
        raise InputError([Problem(str(shown(out)), what, fix)]) from error
    except OSError as error:
        what = f"{MANIFEST_FILE} cannot be read ({error.strerror})"
        raise InputError([Problem(str(out), what, "check its permissions")]) from error
    except ValueError as error:
        raise VerifyError(f"{out / MANIFEST_FILE}: {error}; merge again") from error


def check_sources(plan: Plan, opened: Mapping[str, Checkpoint], out: Path) -> None:
    """Refuse sources that changed after the mixture in `out` was made from them.

    Raises:
        InputError: names each source that changed.
    """
    if problems := changed_sources(plan, opened, out):
        raise InputError(problems)


def changed_sources(plan: Plan, opened: Mapping[str, Checkpoint], out: Path) -> list[Problem]:
    """A problem for each source that changed; `opened` are the available sources by reference."""
    fix = "restore it, or merge again"
    return [
        Problem(source.reference, f"{what} changed since {out} was made of it", fix)
        for source in plan.sources
        if source.reference in opened and (what := what_changed(source, opened[source.reference]))
    ]


def what_changed(source: Source, now: Checkpoint) -> str:
    """Which part of a source changed, as words for a message; empty if nothing changed."""
    if not now.is_still(source.fingerprint):
        return "it"
    return "its tokenizer" if source.tokens not in (None, now.tokens) else ""


def available_sources(
    plan: Plan, reporter: Reporter, cache_dir: str | Path | None
) -> tuple[dict[str, dict[str, Location]], set[str]]:
    """Return the tensors of each source that is available and unchanged; a note names the others.

    Also returns the sources with another modification time than at the merge. Their files were
    copied or touched, or their content changed in a place that the fingerprint does not cover.
    """
    found, newer = dict[str, dict[str, Location]](), set[str]()
    read: dict[str, set[str]] = {}
    known: dict[str, Path] = {}
    for one in (one for tensor in plan.tensors for one in recipe.reads(tensor.recipe)):
        read.setdefault(one.source, set()).add(one.tensor)
    for source in plan.sources:
        try:
            opened = with_rows(_reopen(source, cache_dir, known), read.get(source.reference, ()))
        except SourceProblem as error:
            reporter.say(f"{source.reference}: not compared ({error.what})")
            continue
        if what := what_changed(source, opened):
            line = f"{source.reference}: {what} changed since the merge, so it is not compared"
            reporter.say(f"{line}: the output is checked by its own checksums")
            continue
        newer |= {source.reference} if opened.modified != source.modified else set()
        found[source.reference] = {
            name: at for name, at in opened.tensors.items() if at.file.name not in opened.absent
        }
        if opened.tensors and not found[source.reference]:
            reporter.say(f"{source.reference}: not compared (the Hub's cache has no weights of it)")
    return found, newer


def _reopen(source: Source, cache_dir: str | Path | None, known: dict[str, Path]) -> Checkpoint:
    directory = Path(source.directory) if source.directory else None
    if directory is None and not source.repo:
        raise SourceProblem("it was a directory on the machine of the merge", "")
    if directory is not None and not directory.exists():
        raise SourceProblem(f"{directory} is gone", "")
    file = "" if directory else parse_source(source.reference)[0].file
    reference = Reference(source.reference, directory, source.repo or "", source.commit, file)
    return open_checkpoint(reference, cache_dir, known)
