"""A finished mixture of any tool, opened as experts and a body from its headers alone.

Shapes: E experts, D hidden size, F an expert's intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moemerge.architectures import (
    COUNTS,
    SEGMENTS,
    SPLIT_FACTOR,
    Names,
    Reading,
    count_of,
    in_files,
    name_of,
    reading_of,
)
from moemerge.checkpoint import (
    Checkpoint,
    NoSource,
    SourceProblem,
    open_checkpoint,
    parse_source,
)
from moemerge.config import parse_config
from moemerge.errors import Findings, InputError, Problem, nearest
from moemerge.files import place_of
from moemerge.mixture.dense_body import check_body, dense_config_of
from moemerge.mixture.parts import Part, check_parts, parts_of
from moemerge.output import MANIFEST_FILE, Manifest, is_shard, read_manifest, settle
from moemerge.plan import reads


@dataclass(frozen=True)
class Moe:
    """An opened mixture. `config` is its config.json; `dense` is the config of a dense model with
    the same body.

    `names` are the experts' names in the manifest; without one, `expert 0` and so on. Each expert
    has `segments` parts; tensors and `per_token` count parts. For a split, `factor` is the number
    by which the sum of the chosen slices was multiplied; otherwise it is 0.
    """

    text: str
    checkpoint: Checkpoint
    family: str
    reading: Reading
    config: dict[str, Any]
    dense: dict[str, Any]
    names: tuple[str, ...]
    per_token: int
    parts: tuple[Part, ...]
    manifest: Manifest | None = None
    segments: int = 1
    factor: int = 0

    @property
    def tensors(self) -> Names:
        """The names of the experts' and routers' tensors."""
        return self.reading.names

    @property
    def experts(self) -> int:
        """The number of experts as the class counts them: every segment is one."""
        return len(self.names) * self.segments

    @property
    def inner(self) -> int:
        """The number of neurons of an expert."""
        return next(p.shape[0] for p in self.parts if p.expert is not None and p.which < 2)

    @property
    def is_misnamed(self) -> bool:
        """Whether a tensor has a name that some readers do not know."""
        inside = "wrapper" in self.config
        old = {in_files(new, self.config): old for old, new in self.checkpoint.renamed.items()}
        if any(name != was for name, was in old.items()) or (inside and not old):
            return True
        own = self.tensors
        usual = (own.uppers[0], own.lowers[0]) if own.stacked else ()
        return any(not view.of.endswith(usual) for view in self.checkpoint.views.values())

    def number(self, said: str, where: str, findings: Findings) -> int | None:
        """The index of the expert with that number or name; None, with a problem, without one."""
        count = len(self.names)
        if said.isascii() and said.isdigit() and len(said) < 9 and int(said) < count:
            return int(said)
        if said in self.names:
            return self.names.index(said)
        fix = f"name one of 0 to {count - 1}"
        if self.manifest:
            fix = nearest(said, self.names) + f", or a number from 0 to {count - 1}"
        findings.problem(where, f"{said!r} is none of its {count} experts", fix)
        return None


def open_moe(named: str | Path, cache_dir: str | Path | None, notes: Findings) -> Moe:
    """Open a mixture: a directory or a Hub id. Notes about the mixture are added to `notes`.

    Raises:
        InputError: with every problem of the mixture.
    """
    text, findings = str(named), Findings()
    try:
        reference, on_top = parse_source(text)
        if on_top:
            what = "a mixture with an adapter on top cannot be taken apart"
            raise NoSource(what, "name a mixture's directory, or user/name")
        if reference.directory:
            settle(reference.directory)
        opened = open_checkpoint(reference, cache_dir)
    except NoSource as error:
        raise InputError([Problem(text, str(error), error.fix)]) from error
    except SourceProblem as error:
        raise InputError([Problem(text, error.what, error.fix)]) from error
    for note in opened.notes:
        findings.note(f"{text}: {note}")
    config = opened.config
    family = str(config.get("model_type"))
    reading = reading_of(config.get("model_type"), opened.tensors)
    if reading is None:
        what = f"is of type {family!r}, no mixture that is known"
        fix = "name a mixture whose experts go by usual names"
        raise InputError([Problem(text, what, fix)])
    if reading.names.closed:
        what = f"is a {family}, {reading.names.closed}"
        raise InputError([Problem(text, what, "merge anew: it cannot be taken apart or changed")])
    chosen = reading.per_token
    if reading.names.closed:
        what = f"is a {family}, {reading.names.closed}"
        raise InputError([Problem(text, what, "merge anew: it cannot be taken apart or changed")])
    count, per_token = count_of(config), config.get(chosen)
    for key, value in (("the number of experts", count), (chosen, per_token)):
        if type(value) is not int or value < 1:
            findings.problem(text, f"config.json: {key} is {value!r}", "write how many there are")
    if any(config[key] != count for key in COUNTS if key in config):
        said = " and ".join(key for key in COUNTS if key in config)
        findings.problem(text, f"config.json: {said} disagree", "write how many there are")
    findings.refuse()
    parts = tuple(parts_of(opened, reading.names))
    inner = check_parts(parts, count, config, text, findings)
    dense = dense_config_of(opened, reading, inner, text, findings)
    if not findings.problems and name_of(family):
        check_body(parts, dense, text, findings)
    manifest = _manifest(opened.directory, text, findings)
    segments, factor = portions(config, manifest, count, per_token, text, findings)
    findings.refuse()
    for note in findings.notes:
        notes.note(note)
    assert isinstance(count, int) and isinstance(per_token, int)
    whole = count // segments
    called = manifest.plan.experts if manifest and len(manifest.plan.experts) == whole else None
    return Moe(
        text=reference.text,
        checkpoint=opened,
        family=family,
        reading=reading,
        config=config,
        dense=dense,
        names=called or tuple(f"expert {number}" for number in range(whole)),
        per_token=per_token,
        parts=parts,
        manifest=manifest,
        segments=segments,
        factor=factor,
    )


def portions(
    config: dict[str, Any],
    manifest: Manifest | None,
    count: Any,
    per_token: Any,
    text: str,
    findings: Findings,
) -> tuple[int, int]:
    """`Moe.segments` and `Moe.factor`, from config.json or from the config of the merge.

    Impossible values are recorded as problems.
    """
    told = {key: config[key] for key in (SEGMENTS, SPLIT_FACTOR) if key in config}
    if manifest and manifest.config and not told:
        try:
            merge = parse_config(manifest.config)
            told = {SEGMENTS: merge.segments, SPLIT_FACTOR: per_token if merge.split else 0}
        except InputError:
            pass
    segments, factor = told.get(SEGMENTS, 1), told.get(SPLIT_FACTOR, 0)
    for key, value, least in ((SEGMENTS, segments, 1), (SPLIT_FACTOR, factor, 0)):
        if type(value) is not int or not least <= value <= count:
            findings.problem(text, f"config.json: {key} is {value!r}", "write what it was")
            return 1, 0
    if count % segments or per_token % segments:
        what = (
            f"config.json: {per_token} of {count} experts are no multiples of {segments} segments"
        )
        findings.problem(text, what, "write the numbers that it was merged with")
        return 1, 0
    return segments, factor


def _manifest(directory: Path, text: str, findings: Findings) -> Manifest | None:
    """The manifest; None without one, or, with a note, where it does not fit the files."""
    if not (directory / MANIFEST_FILE).is_file():
        return None
    try:
        manifest = read_manifest(directory)
        told = [manifest.config, *(source.reference for source in manifest.plan.sources)]
        for read in (one for t in manifest.plan.tensors for one in reads(t.recipe)):
            told += [read.source, read.tensor]
        if not all(isinstance(one, str) for one in told):
            raise ValueError("it names what is no text")
        for shard in manifest.plan.shards:
            path = place_of(directory, shard.file)
            if path.is_file() and not is_shard(path, shard):
                raise ValueError(f"{shard.file} is not the file that it tells of")
    except (OSError, ValueError, RecursionError) as error:
        findings.note(f"{text}: its {MANIFEST_FILE} is not used: {error}")
        return None
    return manifest
