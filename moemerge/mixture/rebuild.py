"""Writes an edited mixture: a plan that mostly reads the old files, and copies whole shards.

A shard that is in both plans is copied by the kernel, which shares its blocks where the file system
can (XFS, Btrfs). Files are never linked, so an edit of one mixture in place does not change
another. If the old mixture has a manifest, the new manifest names the same sources, as a merge
would have written it, so `regate` works on the result.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moemerge import output
from moemerge.architectures import as_file
from moemerge.card import files as card_files
from moemerge.card import without_evaluation
from moemerge.checkpoint import Donor, Location, check_unchanged, fetch, read_header
from moemerge.errors import Findings
from moemerge.files import CONFIG_FILE, PART_SUFFIX, place_of
from moemerge.merging import save
from moemerge.mixture.edited_plan import Edit, checkpoints_of, plan_of
from moemerge.options import Options, RunOptions
from moemerge.output import (
    STATE_DIRECTORY,
    Change,
    FileEntry,
    How,
    Manifest,
    OutputFile,
    State,
    held,
    is_shard,
    is_whole,
    settle,
    verify_shards,
    write_shard,
)
from moemerge.plan import ROUTERS, Plan, Shard, Sources, recipe
from moemerge.reporting import Reporter
from moemerge.text import Vocabulary

if TYPE_CHECKING:
    from moemerge.gates import Matrix


@dataclass(frozen=True)
class EditResult:
    """The new model in `out`: `copied` bytes in whole files, `written` bytes in other files."""

    out: Path
    plan: Plan
    copied: int
    written: int


def build(
    edit: Edit, out: Path, options: Options, reporter: Reporter, findings: Findings
) -> EditResult:
    """Write the edited mixture; a run that was cut off goes on."""
    moe = edit.moe
    plan, shards = plan_of(edit, options)
    body = Donor("MOE", Path(moe.text).name, replace(moe.checkpoint, config=moe.dense))
    vocabulary = Vocabulary(body, moe.checkpoint.directory)
    carried = output.carried_files(vocabulary, options.copy_tokenizer)
    output.check_carried(vocabulary, carried, moe.text, findings)
    directories = [one.directory for one in checkpoints_of(edit)]
    settle(out)
    output.check(out, plan, carried, directories, options, findings)
    findings.refuse()
    for note in findings.notes:
        reporter.say(note)
    with held(out) as change:
        output.begin(out, plan, output.file_names(plan, carried), options)
        sources = _sources(edit, shards, options, reporter)
        if edit.routers:
            sources[ROUTERS] = _computed(edit.routers, shards, sources, State(out).routers)
        entries, copied = _write(edit, plan, shards, sources, out, options, reporter)
        if options.verify:
            verify_shards(replace(plan, shards=shards), out, sources)
        files: dict[str, FileEntry] = {**entries}
        for name, content in output.carried_content(vocabulary, carried):
            change.write(name, content)
            files[name] = change.entry(name)
        change.write(output.CARD_FILE, _card(edit, reporter))
        files |= {name: {} for name in output.OWN_FILES}
        change.finish(_manifest(edit, plan, files))
    return EditResult(out, plan, copied, plan.nbytes - copied)


def _manifest(edit: Edit, plan: Plan, files: dict[str, FileEntry]) -> Manifest:
    before = edit.moe.manifest
    folder, card = (before.folder, before.card) if before else (None, {})
    return Manifest(edit.text, plan, files, folder=folder, card=card)


def _sources(
    edit: Edit, shards: Iterable[Shard], options: RunOptions, reporter: Reporter
) -> dict[str, dict[str, Location]]:
    """Every source's tensors. Those needed from the Hub are downloaded first, or streamed later."""
    needed: dict[str, set[str]] = {}
    for shard in shards:
        for read in (read for t in shard.tensors for read in recipe.reads(t.recipe)):
            needed.setdefault(read.source, set()).add(read.tensor)
    for opened in checkpoints_of(edit) if edit.routers else ():  # the models run
        needed.setdefault(opened.reference.text, set()).update(opened.tensors)
    found = {}
    for opened in checkpoints_of(edit):
        text = opened.reference.text
        names = needed.get(text, ())
        found[text] = fetch(opened, names, options.cache_dir, reporter, options.stream).tensors
    return found


def _computed(
    made_by: Callable[[Sources], dict[str, Matrix]],
    shards: Sequence[Shard],
    sources: Sources,
    path: Path,
) -> dict[str, Location]:
    """Compute the new routers, unless an earlier run did; returns where they lie."""
    if not path.exists():
        made = made_by(sources)
        tensors = tuple(t for shard in shards for t in shard.tensors if t.name in made)
        save(replace(shards[0], tensors=tensors), made, {}, path)
    return read_header(path)


def _write(
    edit: Edit,
    plan: Plan,
    shards: Sequence[Shard],
    sources: dict[str, dict[str, Location]],
    out: Path,
    options: Options,
    reporter: Reporter,
) -> tuple[dict[str, FileEntry], int]:
    """Write the shards that are missing. Returns the manifest's entries, and the bytes that were
    copied as whole files."""
    state, before = State(out), edit.moe.manifest
    old = {shard.digest: shard for shard in before.plan.shards} if before else {}
    entries, copied = {}, 0
    how = How(options.threads, options.past_the_cache, options.checksums)
    with reporter.progress("writing", plan.nbytes, "B") as advance:
        for shard in shards:
            entry = state.entry(shard)
            if entry and is_whole(shard, out, entry):
                advance(shard.nbytes)
            else:
                entry = {}
                if before and shard.digest in old:
                    file = edit.moe.checkpoint.directory / old[shard.digest].file
                    places = _places(shard, sources)
                    if {one.file for one in places} == {file} and _copied(places[0], shard, out):
                        entry = before.files[file.name]
                        copied += shard.nbytes
                        advance(shard.nbytes)
                entry = entry or write_shard(shard, sources, out, how, advance)
                with output.writing(out):
                    state.finished(shard, entry)
            entries[shard.file] = entry
    return entries, copied


def _places(shard: Shard, sources: dict[str, dict[str, Location]]) -> list[Location]:
    """Where the shard's tensors are read from. The index decides, not the manifest."""
    reads = (read for tensor in shard.tensors for read in recipe.reads(tensor.recipe))
    return [sources[read.source][read.tensor] for read in reads]


def _copied(place: Location, shard: Shard, out: Path) -> bool:
    """Let the kernel copy the whole file of a tensor. False if it does not, or if the file is not
    this shard."""
    old = place.file
    part = out / STATE_DIRECTORY / f"{shard.file}.{uuid.uuid4().hex[:8]}{PART_SUFFIX}"
    with output.writing(out):
        try:
            if not is_shard(old, shard):
                return False
            made = OutputFile(part, shard.nbytes, direct=False)
            if not made.copy_range(old, 0, shard.nbytes, 0):
                return False
            check_unchanged(place)
            made.finish(place_of(out, shard.file))
        except FileNotFoundError:
            return False
        finally:
            part.unlink(missing_ok=True)
    return True


def _card(edit: Edit, reporter: Reporter) -> bytes:
    """The mixture's own card if it is still the same model, otherwise a short one."""
    kept = edit.moe.checkpoint.directory / output.CARD_FILE
    if edit.same_model and kept.is_file():
        routed_otherwise = edit.per_token != edit.moe.per_token
        new = card_files.rewritten(kept, without_evaluation, reporter) if routed_otherwise else None
        return kept.read_bytes() if new is None else new
    tags = ["moemerge", "merge", *(["moe"] if len(edit.experts) > 1 else [])]
    head = "".join(f"- {tag}\n" for tag in tags)
    return f"---\nlibrary_name: transformers\ntags:\n{head}---\n\n{edit.story}\n".encode()


def build_in_place(edit: Edit, change: Change, reporter: Reporter) -> EditResult:
    """Replace config.json, the manifest (if there is one) and the card together."""
    moe, before = edit.moe, edit.moe.manifest
    if before:
        chosen = edit.per_token // moe.segments
        plan = replace(before.plan, config=as_file(edit.config), experts_per_token=chosen)
        made = replace(before, plan=plan, config=edit.text or before.config)
        change.write_json(output.MANIFEST_FILE, made.to_json())
    else:
        plan = plan_of(edit, Options())[0]
    change.write_json(CONFIG_FILE, as_file(edit.config))
    card_files.drop_evaluation(change, reporter)
    change.commit()
    return EditResult(change.out, plan, 0, 0)
