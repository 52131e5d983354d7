"""An edited mixture written: a plan that mostly reads the old files, and copies what it can whole.

A shard that the old and the new plan have in common is copied within the kernel, which shares its
blocks where the file system can (XFS, Btrfs). Nothing is ever linked: who edits one mixture in
place does not change another. Where the old mixture has a manifest, the new one's says of what the
weights were made in the first place, as if it had been merged so: `regate` works on it.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moemerge import output
from moemerge.card import files as card_files
from moemerge.card import without_evaluation
from moemerge.checkpoint import Checkpoint, Donor, Location, check_unchanged, fetch
from moemerge.errors import Findings
from moemerge.files import CONFIG_FILE, PART_SUFFIX
from moemerge.mixture.open import Moe, Part, planned
from moemerge.options import Options, RunOptions, ShardSize, WriteOptions
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
from moemerge.plan import (
    Cut,
    Join,
    LowRank,
    Mean,
    Noise,
    Plan,
    PlannedTensor,
    Read,
    Recipe,
    Renew,
    Scale,
    Shard,
    cut,
    recipe,
    shards_of,
)
from moemerge.prepare import source_of
from moemerge.reporting import Reporter
from moemerge.text import Vocabulary

_GIVEN = "given"
"""The gate mode of a mixture whose routers are those that it came with."""


@dataclass(frozen=True)
class Built:
    """What was built in `out`: `copied` bytes in whole files, `written` bytes in others."""

    out: Path
    plan: Plan
    copied: int
    written: int


@dataclass(frozen=True)
class Edit:
    """What is to become of a mixture: its new parts, config.json and experts, of which models."""

    moe: Moe
    parts: Sequence[Part]
    config: dict[str, Any]
    experts: tuple[str, ...]
    per_token: int
    story: str
    donors: tuple[Donor, ...] = ()
    text: str = ""
    same_model: bool = False


def _plan(edit: Edit, options: WriteOptions) -> tuple[Plan, tuple[Shard, ...]]:
    """The plan that says what the weights are made of, and its shards as they are to be written.

    Tensors stay in the files that they were in, routers come first, and what is new comes last.
    """
    moe, before = edit.moe, edit.moe.manifest
    tensors = list(planned(edit.parts, moe.tensors))
    limit = ShardSize.parse(options.shard_size).max_bytes(2)
    new = [tensor for file, tensor in tensors if not (file or tensor.made)]
    kept: dict[str, list[PlannedTensor]] = {}
    for file, tensor in tensors:
        if file:
            kept.setdefault("" if tensor.made else file, []).append(tensor)
    if "" in kept:
        groups = [tuple(kept.pop("")), *map(tuple, kept.values()), *cut(new, limit)]
    else:
        groups = list(cut((tensor for _, tensor in tensors), limit))
    origins = _origins(moe)
    said = [tuple(_as_merged(tensor, moe.text, origins) for tensor in group) for group in groups]
    read = {read.source for group in said for t in group for read in recipe.reads(t.recipe)}
    known = {one.reference: one for one in before.plan.sources} if before else {}
    opened = {one.reference.text: source_of(one) for one in _checkpoints(edit)}
    if before:  # else one that it knows would not be what the old shards are made of
        opened = {n: s if n == moe.text else before.plan.remembered(s) for n, s in opened.items()}
    sources = tuple(source for name, source in {**known, **opened}.items() if name in read)
    inputs = before.plan.gate_inputs if before else ""
    shards = shards_of(said, sources, inputs)
    plan = Plan(
        architecture=str(edit.config["model_type"]),
        gate_mode=before.plan.gate_mode if before else _GIVEN,
        gate_inputs=inputs,
        seed=before.plan.seed if before else 0,
        dtype=groups[-1][-1].dtype,
        experts=edit.experts,
        experts_per_token=edit.per_token // moe.segments,
        config=edit.config,
        sources=sources,
        shards=shards,
    )
    pairs = zip(shards, groups, strict=True)
    return plan, tuple(replace(shard, tensors=group) for shard, group in pairs)


def _origins(moe: Moe) -> dict[str, PlannedTensor]:
    """What the old manifest has of each tensor, and of each expert's part of those of all."""
    found = {one.name: one for one in moe.manifest.plan.tensors} if moe.manifest else {}
    for name, view in moe.checkpoint.views.items():
        whole, values = found.get(view.of), math.prod(view.shape)
        if whole and isinstance(whole.recipe, Join):
            parts, at = whole.recipe.of, view.start // values
            if whole.parameters == len(parts) * values:
                drawn_for = f"{whole.name}[{at}]"
                found[name] = PlannedTensor(drawn_for, view.shape, whole.dtype, parts[at])
    return found


def _as_merged(tensor: PlannedTensor, old: str, origins: dict[str, PlannedTensor]) -> PlannedTensor:
    """A copy of an old tensor with the recipe that the old manifest has of it, if it holds still.

    What was drawn at random was drawn for the name that the tensor had.
    """
    made = tensor.recipe
    if isinstance(made, Join) and tensor.expert == -1:
        shape = (tensor.parameters // len(made.of) // tensor.shape[-1], tensor.shape[-1])
        parts = (
            PlannedTensor(f"{tensor.name}[{number}]", shape, tensor.dtype, part)
            for number, part in enumerate(made.of)
        )
        return replace(
            tensor, recipe=Join(tuple(_as_merged(part, old, origins).recipe for part in parts))
        )
    before = origins.get(made.tensor) if isinstance(made, Read) and made.source == old else None
    same = before and (before.shape, before.dtype) == (tensor.shape, tensor.dtype)
    if before is None or not same or (before.name != tensor.name and _draws(before.recipe)):
        return tensor
    return replace(tensor, recipe=before.recipe)


def _draws(made: Recipe) -> bool:
    if isinstance(made, Mean | Join):
        return any(map(_draws, made.of))
    draws = isinstance(made, Noise | Renew)
    return draws or (isinstance(made, LowRank | Scale | Cut) and _draws(made.of))


def _checkpoints(edit: Edit) -> list[Checkpoint]:
    adapters = [donor.adapter.checkpoint for donor in edit.donors if donor.adapter]
    return [edit.moe.checkpoint, *(donor.model for donor in edit.donors), *adapters]


def build(edit: Edit, out: Path, options: Options, reporter: Reporter, findings: Findings) -> Built:
    """Write what an edit makes, going on where a run of the same edit was cut off."""
    moe = edit.moe
    plan, shards = _plan(edit, options)
    body = Donor("MOE", Path(moe.text).name, replace(moe.checkpoint, config=moe.dense))
    vocabulary = Vocabulary(body, moe.checkpoint.directory)
    carried = output.carried_files(vocabulary, options.copy_tokenizer)
    output.check_carried(vocabulary, carried, moe.text, findings)
    directories = [one.directory for one in _checkpoints(edit)]
    settle(out)
    output.check(out, plan, carried, directories, options, findings)
    findings.refuse()
    for note in findings.notes:
        reporter.say(note)
    with held(out) as change:
        output.begin(out, plan, output.file_names(plan, carried), options)
        sources = _sources(edit, shards, options, reporter)
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
    return Built(out, plan, copied, plan.nbytes - copied)


def _manifest(edit: Edit, plan: Plan, files: dict[str, FileEntry]) -> Manifest:
    before = edit.moe.manifest
    folder, card = (before.folder, before.card) if before else (None, {})
    return Manifest(edit.text, plan, files, folder=folder, card=card)


def _sources(
    edit: Edit, shards: Iterable[Shard], options: RunOptions, reporter: Reporter
) -> dict[str, dict[str, Location]]:
    """Every model's tensors, with what has to come from the Hub downloaded or to be streamed."""
    needed: dict[str, set[str]] = {}
    for shard in shards:
        for read in (read for t in shard.tensors for read in recipe.reads(t.recipe)):
            needed.setdefault(read.source, set()).add(read.tensor)
    found = {}
    for opened in _checkpoints(edit):
        text = opened.reference.text
        names = needed.get(text, ())
        found[text] = fetch(opened, names, options.cache_dir, reporter, options.stream).tensors
    return found


def _write(
    edit: Edit,
    plan: Plan,
    shards: Sequence[Shard],
    sources: dict[str, dict[str, Location]],
    out: Path,
    options: Options,
    reporter: Reporter,
) -> tuple[dict[str, FileEntry], int]:
    """Every shard that is not there yet: its manifest entry by file, and the bytes copied whole."""
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
    """Where the shard's tensors are read from: the index decides, not the manifest."""
    reads = (read for tensor in shard.tensors for read in recipe.reads(tensor.recipe))
    return [sources[read.source][read.tensor] for read in reads]


def _copied(place: Location, shard: Shard, out: Path) -> bool:
    """Copy the whole file of a tensor within the kernel; False if it will not, or the file is not
    the shard."""
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
            made.finish(out / shard.file)
        except FileNotFoundError:
            return False
        finally:
            part.unlink(missing_ok=True)
    return True


def _card(edit: Edit, reporter: Reporter) -> bytes:
    """The mixture's own card where it is the same model still, else a short one."""
    kept = edit.moe.checkpoint.directory / output.CARD_FILE
    if edit.same_model and kept.is_file():
        routed_otherwise = edit.per_token != edit.moe.per_token
        new = card_files.rewritten(kept, without_evaluation, reporter) if routed_otherwise else None
        return kept.read_bytes() if new is None else new
    tags = ["moemerge", "merge", *(["moe"] if len(edit.experts) > 1 else [])]
    head = "".join(f"- {tag}\n" for tag in tags)
    return f"---\nlibrary_name: transformers\ntags:\n{head}---\n\n{edit.story}\n".encode()


def build_in_place(edit: Edit, change: Change, reporter: Reporter) -> Built:
    """Change config.json, the manifest if there is one, and the card, together."""
    moe, before = edit.moe, edit.moe.manifest
    if before:
        chosen = edit.per_token // moe.segments
        plan = replace(before.plan, config=edit.config, experts_per_token=chosen)
        made = replace(before, plan=plan, config=edit.text or before.config)
        change.write_json(output.MANIFEST_FILE, made.to_json())
    else:
        plan = _plan(edit, Options())[0]
    change.write_json(CONFIG_FILE, edit.config)
    card_files.drop_evaluation(change, reporter)
    change.commit()
    return Built(change.out, plan, 0, 0)
