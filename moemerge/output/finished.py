"""A finished output: its manifest, opened or refused, and whether its sources changed since."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moemerge.checkpoint import (
    Checkpoint,
    nearest_directory,
)
from moemerge.errors import InputError, Problem, VerifyError
from moemerge.files import CONFIG_FILE
from moemerge.output.change import settle
from moemerge.output.manifest import MANIFEST_FILE, Manifest, read_manifest
from moemerge.plan import (
    Plan,
    Source,
)


def check_shards(out: Path, plan: Plan, action: str) -> None:
    """Refuse a directory that is not whole, or whose shards were pushed as they were finished."""
    if (out / CONFIG_FILE).exists():
        return
    what, fix = f"holds no {CONFIG_FILE}: it is not finished", "merge again, or copy it again"
    if not any((out / shard.file).exists() for shard in plan.shards):
        what = "holds no shards"
        fix = f"where they were pushed as it went, {action} a downloaded copy"
    raise InputError([Problem(str(out), what, fix)])


def manifest_of(out: Path, action: str) -> Manifest | None:
    """The manifest of a mixture; None of one that moemerge did not make.

    Raises:
        InputError: its shards are gone.
        VerifyError: the manifest is broken.
    """
    settle(out)
    if not (out / MANIFEST_FILE).exists():
        return None
    manifest = open_manifest(out)
    check_shards(out, manifest.plan, action)
    return manifest


def open_manifest(out: Path) -> Manifest:
    """The manifest of a finished directory; what a killed run had decided is completed first.

    Raises:
        InputError: the directory is not a finished output of moemerge.
        VerifyError: the manifest is broken.
    """
    settle(out)
    try:
        return read_manifest(out)
    except (FileNotFoundError, NotADirectoryError) as error:
        near = "" if out.exists() else nearest_directory(str(out), None)
        what, fix = f"holds no {MANIFEST_FILE}", near or "name a directory that moemerge finished"
        raise InputError([Problem(str(out), what, fix)]) from error
    except OSError as error:
        what = f"{MANIFEST_FILE} cannot be read ({error.strerror})"
        raise InputError([Problem(str(out), what, "check its permissions")]) from error
    except ValueError as error:
        raise VerifyError(f"{out / MANIFEST_FILE}: {error}; merge again") from error


def check_sources(plan: Plan, opened: Mapping[str, Checkpoint], out: Path) -> None:
    """Refuse to go on with sources that are no longer what the mixture in `out` was made of.

    Raises:
        InputError: some changed; names each.
    """
    if problems := changed_sources(plan, opened, out):
        raise InputError(problems)


def changed_sources(plan: Plan, opened: Mapping[str, Checkpoint], out: Path) -> list[Problem]:
    """A problem for each source that changed; `opened` are those at hand, by their references."""
    fix = "give back what it was, or merge anew"
    return [
        Problem(source.reference, f"{what} changed since {out} was made of it", fix)
        for source in plan.sources
        if source.reference in opened and (what := what_changed(source, opened[source.reference]))
    ]


def what_changed(source: Source, now: Checkpoint) -> str:
    """What of a source is not what it was; empty if it is the same."""
    if not now.is_still(source.fingerprint):
        return "it"
    return "its tokenizer" if source.tokens not in (None, now.tokens) else ""
