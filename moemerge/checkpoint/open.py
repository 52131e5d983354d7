"""A model or an adapter, opened: its config and the places of its tensors; no weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from moemerge.architectures import language_part, reading_of
from moemerge.checkpoint import claims, fingerprint, formats
from moemerge.checkpoint.folder import IN_REPOSITORY, POINTER, Folder, is_pointer, read_json
from moemerge.checkpoint.fused import View, rows_named, views_of, with_views
from moemerge.checkpoint.gguf.imatrix import FAMILY as IMATRIX
from moemerge.checkpoint.gguf.source import GgufModel, IsImatrix, files_of, open_gguf
from moemerge.checkpoint.location import Location, Stamp
from moemerge.checkpoint.not_a_model import GATHER, ORIGINALS, SourceProblem, some
from moemerge.checkpoint.prefixes import usual
from moemerge.checkpoint.reference import GGUF, Reference, nearest_directory
from moemerge.errors import ReadError
from moemerge.families import EMBEDDING, HEAD, normalise, record_of
from moemerge.hub import NOWHERE, HubError, Remote, open_remote
from moemerge.hub import download as hub
from moemerge.reporting import Reporter, listener

_SMALL_BYTES = 1 << 28
"""The fingerprint of an adapter up to this size uses all its bytes."""


@dataclass(frozen=True)
class Checkpoint:
    """One source, opened.

    `absent` are weight files that are only on the Hub. A `partial` source is the Hub's cache,
    opened without a network. `views` are those of `tensors` that are parts of tensors in its files.
    `renamed` gives the names in `tensors` by the names in the files, if they differ. Of a `gguf`
    file, `directory` holds the tokenizer's files. `fingerprint`
    identifies the content: the Hub's commit, or a digest of headers, config and a part of every
    tensor. `headers` is the fingerprint of earlier versions. `notes` are lines that a person should
    read.
    """

    reference: Reference
    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Location]
    fingerprint: str
    headers: str
    commit: str | None = None
    modified: int | None = None
    absent: dict[str, Remote] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    views: dict[str, View] = field(default_factory=dict)
    partial: bool = False
    renamed: dict[str, str] = field(default_factory=dict)
    gguf: GgufModel | None = None

    @property
    def place(self) -> Path:
        """Its directory, or its GGUF file."""
        return (
            self.reference.directory
            if (self.gguf or self.is_imatrix) and self.reference.directory
            else self.directory
        )

    @property
    def lost_its_tokenizer(self) -> bool:
        """Whether it is a cache without a tokenizer; the repository may have one."""
        return self.partial and not any((self.directory / n).exists() for n in hub.VOCABULARIES)

    @property
    def streams(self) -> bool:
        """Whether single tensors of its absent files can be read on the Hub."""
        return bool(self.gguf) or all(formats.format_of(f).STREAMS for f in self.absent)

    @property
    def is_imatrix(self) -> bool:
        """Whether this is an importance matrix and not a model."""
        return self.config.get("model_type") == IMATRIX

    @property
    def is_adapter(self) -> bool:
        """Whether this is a PEFT adapter and not a whole model."""
        return "peft_type" in self.config

    @property
    def tokens(self) -> str:
        """A digest of its tokenizer."""
        return fingerprint.of_files(self.directory / name for name in hub.VOCABULARIES)

    def is_still(self, its: str) -> bool:
        """Whether this source has the fingerprint `its`, which may be of an earlier version."""
        sampled = self.commit or its.startswith(fingerprint.SAMPLED)
        return its == (self.fingerprint if sampled else self.headers)


def open_checkpoint(
    reference: Reference, cache_dir: str | Path | None = None, known: dict[str, Path] | None = None
) -> Checkpoint:
    """Open a model or adapter: read its config and headers.

    `known` are the tokenizers of earlier sources, for `hub.open_snapshot`.

    Raises:
        SourceProblem: it is missing, damaged, quantised, or not a model at all.
    """
    try:
        if reference.directory and reference.directory.suffix == GGUF:
            return _open_gguf(reference, reference.directory)
        if reference.directory:
            return _open(reference, reference.directory, None)
        snapshot = hub.open_snapshot(
            reference.repo, reference.revision, cache_dir, {} if known is None else known
        )
        if reference.file:
            return _open_gguf(reference, snapshot.directory / reference.file, snapshot)
        return _open(reference, snapshot.directory, snapshot)
    except ReadError as error:
        raise SourceProblem(str(error), "check that its files are whole") from error
    except HubError as error:
        missing = error.what.startswith(NOWHERE)
        near = nearest_directory(reference.text, reference.beside) if missing else ""
        fix = f"{near} Otherwise {error.fix}" if near else error.fix
        raise SourceProblem(error.what, fix) from error
    except OSError as error:
        what = f"{error.filename or reference.text} cannot be read ({error.strerror})"
        raise SourceProblem(what, "check the path and its permissions") from error


def fetch(
    checkpoint: Checkpoint,
    names: Iterable[str],
    cache_dir: str | Path | None,
    reporter: Reporter | None = None,
    stream: bool = False,
) -> Checkpoint:
    """Download absent files that hold the tensors `names`; returns the source opened again.

    With `stream`, nothing is downloaded: tensors are read from the Hub when needed, if their format
    allows it.

    Raises:
        ReadError: the download failed, or a file is not what the plan was made from.
    """
    names = set(names)
    if stream and checkpoint.streams:
        return _streamed(checkpoint, names)
    if checkpoint.gguf:
        return _fetched(checkpoint, checkpoint.gguf, names, cache_dir, reporter)
    doubted = EMBEDDING in names and _is_doubtful(checkpoint)
    if doubted:
        names.add(HEAD)
    files = {checkpoint.tensors[name].file.name for name in names} & set(checkpoint.absent)
    if not files:
        return checkpoint
    what = f"{checkpoint.reference.text}: downloading what is needed into the Hub's cache"
    listener(reporter, False).say(what)
    hub.fetch([checkpoint.absent[file] for file in files], cache_dir, reporter)
    tensors = dict(checkpoint.tensors)
    for file in files:
        path = checkpoint.directory / file
        try:
            found = _read_local_header(path)
            found = {checkpoint.renamed.get(name, name): at for name, at in found.items()}
            parts = checkpoint.views.items()
            found |= {name: view.at(found[view.of]) for name, view in parts if view.of in found}
        except (OSError, ValueError) as error:
            raise ReadError(f"{path}: {error}; download it again") from error
        for name, location in found.items():
            if name in tensors and tensors[name].file == path:
                told = tensors[name]
                if (location.encoding, location.shape) != (told.encoding, told.shape):
                    raise ReadError(f"{path}: {name} is not what the Hub said; run again")
                tensors[name] = location
    absent = {file: at for file, at in checkpoint.absent.items() if file not in files}
    if doubted:
        _confirm(checkpoint, tensors, "run it again")
    return dataclasses.replace(checkpoint, tensors=tensors, absent=absent)


def _streamed(checkpoint: Checkpoint, names: Iterable[str]) -> Checkpoint:
    """The source, with every absent file's tensors read from the Hub."""
    tensors = {
        name: dataclasses.replace(at, remote=checkpoint.absent.get(at.file.name))
        for name, at in checkpoint.tensors.items()
    }
    if EMBEDDING in names and _is_doubtful(checkpoint):
        _confirm(checkpoint, tensors, "run it again without --stream")
    return dataclasses.replace(checkpoint, tensors=tensors)


def _is_doubtful(checkpoint: Checkpoint) -> bool:
    return claims.is_doubtful(checkpoint.config, checkpoint.tensors, checkpoint.absent)


def _confirm(checkpoint: Checkpoint, tensors: dict[str, Location], fix: str) -> None:
    """Refuse a head that differs from the embeddings although samples were equal."""
    if not claims.is_equal(tensors[EMBEDDING], tensors[HEAD]):
        raise ReadError(f"{checkpoint.reference.text}: {claims.UNTIED}; {fix}")


def with_rows(checkpoint: Checkpoint, names: Iterable[str]) -> Checkpoint:
    """The source, with those of `names` that `fused.row_name` made of rows of its tensors.

    Raises:
        SourceProblem: the tensors are encoded in blocks, and the rows begin within a block.
    """
    views = rows_named(checkpoint.tensors, names)
    if not views:
        return checkpoint
    try:
        rows = {name: view.at(checkpoint.tensors[view.of]) for name, view in views.items()}
    except ValueError as error:
        raise SourceProblem(str(error), ORIGINALS) from error
    tensors = checkpoint.tensors | rows
    return dataclasses.replace(checkpoint, tensors=tensors, views=checkpoint.views | views)


def _open(reference: Reference, directory: Path, snapshot: hub.Snapshot | None) -> Checkpoint:
    listed = frozenset(snapshot.files) if snapshot else frozenset()
    local = {path.name for path in directory.iterdir() if not path.is_dir()}
    folder = Folder(directory, listed | local, listed, snapshot is not None and not listed)
    adapter = folder.is_adapter
    config_name = "adapter_config.json" if adapter else "config.json"
    if config_name not in folder.names:
        what = f"holds no config.json ({directory})"
        raise folder.problem(what, "name a model directory in transformers' format")
    folder.check([config_name, *filter(_is_read, folder.names)])
    config = said = read_json(directory / config_name)
    family = config.get("model_type")
    if adapter and "peft_type" not in config and "fine_tune_type" in config:
        what = f"is an adapter of mlx-lm ({config['fine_tune_type']}), not of PEFT"
        fix = "fuse it into its model and name the result: mlx_lm.fuse --model M --adapter-path A"
        raise SourceProblem(what, fix)
    if not adapter:
        try:
            config = normalise(config)
            config = language_part(config) or config
            family = config.get("saved_as", config.get("model_type"))
        except ValueError as error:
            raise SourceProblem(f"config.json: {error}", "repair it") from error
    weights = folder.weights(adapter, said.get("transformers_weights"))
    snapshot = hub.measured(snapshot, weights.files) if snapshot else None
    headers = {file: _read_header(directory / file, snapshot) for file in weights.files}
    tensors = {name: at for found in headers.values() for name, at in found.items()}
    newest = max((at.stamp[1] for at in tensors.values() if at.stamp), default=0)
    notes = [snapshot.note if snapshot else "", weights.note, weights.compare(headers)]
    renamed: dict[str, str] = {}
    if not adapter:
        record = record_of(config)
        renamed, told = usual(tensors, "wrapper" in config, record.in_files if record else {})
        tensors = {renamed.get(name, name): at for name, at in tensors.items()}
        notes.append(told)
    if not adapter and sum(0 in at.shape for at in tensors.values()) * 2 > len(tensors):
        what = (
            f"{weights.files[0]} has empty tensors, as DeepSpeed ZeRO-3 leaves what it holds apart"
        )
        raise SourceProblem(what, GATHER)
    if not adapter:
        try:
            notes += claims.drop_quantisation(config, tensors)
        except ValueError as error:
            raise SourceProblem(str(error), ORIGINALS) from error
    layers, count = config.get("num_hidden_layers"), max(len(tensors), len(weights.index or ()))
    known = record_of(config) or reading_of(family, tensors)
    if known and isinstance(layers, int) and layers > count:  # to go on would cost memory
        raise SourceProblem(
            f"config.json: num_hidden_layers is {layers}, its weights are {count} tensors",
            "use the weights and the config.json of one and the same model",
        )
    views, shown = dict[str, View](), tensors
    if not adapter:
        try:
            views = views_of(tensors, family, config)
            shown = with_views(tensors, views)
        except ValueError as error:
            fix = "use the weights and the config.json of one and the same model"
            raise SourceProblem(str(error), fix) from error
    commit = snapshot.commit if snapshot else None
    small = adapter and sum(at.nbytes for at in tensors.values()) <= _SMALL_BYTES
    on_hub = snapshot.files if snapshot else {}
    absent = {file: on_hub[file] for file in weights.files if not (directory / file).exists()}
    if not adapter:
        index = [renamed.get(name, name) for name in weights.index or ()]
        notes += claims.settle(config, shown, absent, index)
    digest = fingerprint.of_headers(headers)
    return Checkpoint(
        reference=reference,
        directory=directory,
        config=config,
        tensors=shown,
        fingerprint=commit or fingerprint.of_content(headers, digest, said, small),
        headers=digest,
        commit=commit,
        modified=None if snapshot else newest,
        absent=absent,
        notes=tuple(filter(None, notes)),
        views=views,
        partial=folder.partial,
        renamed=renamed,
    )


def _fetched(
    checkpoint: Checkpoint,
    model: GgufModel,
    names: set[str],
    cache_dir: str | Path | None,
    reporter: Reporter | None,
) -> Checkpoint:
    """A GGUF model of the Hub, with its files downloaded if a tensor of theirs is needed."""
    if not any(checkpoint.tensors[name].file.name in checkpoint.absent for name in names):
        return checkpoint
    what = f"{checkpoint.reference.text}: downloading it into the Hub's cache"
    listener(reporter, False).say(what)
    hub.fetch(checkpoint.absent.values(), cache_dir, reporter)
    try:
        opened = open_gguf(model.path)
    except (OSError, ValueError) as error:
        raise ReadError(f"{model.path}: {error}; download it again") from error
    if opened.digest != model.digest or opened.tensors.keys() != model.tensors.keys():
        raise ReadError(f"{model.path}: is not what the Hub said; run again")
    return dataclasses.replace(checkpoint, tensors=opened.tensors, absent={}, gguf=opened)


def _open_gguf(
    reference: Reference, path: Path, snapshot: hub.Snapshot | None = None
) -> Checkpoint:
    absent: dict[str, Remote] = {}
    try:
        if snapshot:
            absent = _gguf_files(path, snapshot)
        model = open_gguf(path, absent)
        config = normalise(dict(model.config))
    except IsImatrix as found:
        return _open_imatrix(reference, path, found.tensors)
    except ValueError as error:
        fix = "download or convert it again, or name another file"
        raise SourceProblem(str(error), fix) from error
    record = record_of(config)
    assert record
    digest = fingerprint.of_headers(model.raw) + model.digest
    commit = snapshot.commit if snapshot else None
    own = f"{commit}:{reference.file}" if commit else None
    stamps = [at.stamp[1] for at in model.tensors.values() if at.stamp]
    return Checkpoint(
        reference=reference,
        directory=model.directory,
        config=config,
        tensors=model.tensors,
        fingerprint=own or fingerprint.of_content(model.raw, digest, model.config, False),
        headers=digest,
        commit=commit,
        modified=None if snapshot else max(stamps),
        absent=absent,
        notes=tuple(filter(None, [model.note, snapshot.note if snapshot else ""])),
        views=model.views,
        gguf=model,
    )


def _open_imatrix(reference: Reference, path: Path, tensors: dict[str, Location]) -> Checkpoint:
    found = {path.name: tensors}
    digest = fingerprint.of_headers(found)
    own = fingerprint.of_content(found, digest, {}, whole=True)
    modified = path.stat().st_mtime_ns
    kind = {"model_type": IMATRIX}
    return Checkpoint(reference, path.parent, kind, tensors, own, digest, modified=modified)


def _gguf_files(path: Path, snapshot: hub.Snapshot) -> dict[str, Remote]:
    """The files of a GGUF model that are on the Hub alone, by name.

    Raises:
        ValueError: the repository has no such file.
    """
    folder = path.relative_to(snapshot.directory).parent
    names = [(folder / file.name).as_posix() for file in files_of(path)]
    here = snapshot.directory
    if missing := [n for n in names if n not in snapshot.files and not (here / n).exists()]:
        there = [name for name in snapshot.files if name.endswith(GGUF)]
        told = f"it has {some(there)}" if there else "it has none"
        raise ValueError(f"the repository has no {missing[0]}; {told}")
    snapshot = hub.measured(snapshot, names)
    return {Path(name).name: snapshot.files[name] for name in names if not (here / name).exists()}


def _is_read(name: str) -> bool:
    """Whether a merge reads this small file of a source, beside its weights and their index."""
    unread = name in ("README.md", "config.json", "adapter_config.json")
    return not (unread or name.endswith(".index.json")) and any(
        fnmatch(name, pattern) for pattern in hub.SMALL_FILES
    )


def _read_header(path: Path, snapshot: hub.Snapshot | None) -> dict[str, Location]:
    try:
        if snapshot is None or path.exists():
            return _read_local_header(path)
        with open_remote(snapshot.files[path.name]) as remote:
            return formats.read_header(path, remote)
    except ValueError as error:
        if snapshot and path.name in snapshot.files:
            with open_remote(snapshot.files[path.name]) as remote:
                if is_pointer(remote):
                    raise SourceProblem(f"{path.name} is {POINTER}", IN_REPOSITORY) from error
        raise SourceProblem(f"{path.name}: {error}", formats.format_of(path.name).FIX) from error


def _read_local_header(path: Path) -> dict[str, Location]:
    stamp = Stamp.of(path.stat())
    return {
        name: dataclasses.replace(location, stamp=stamp)
        for name, location in formats.read_header(path).items()
    }
