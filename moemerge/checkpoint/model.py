"""A model or an adapter, opened: its config and where each tensor lies; no weight is read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from moemerge.checkpoint import hub, safetensors_file, torch_file
from moemerge.checkpoint.fused import View, rows_named, views_of, with_views
from moemerge.checkpoint.model_config import normalise
from moemerge.checkpoint.reference import Reference
from moemerge.checkpoint.remote import HubError, Remote, open_remote
from moemerge.checkpoint.tensors import Location
from moemerge.errors import ReadError

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_QUANTISED = "merge from the original weights: a merge cannot read quantised ones"


class SourceProblem(Exception):
    """A source that cannot be opened: `what` is wrong with it and how to `fix` it."""

    def __init__(self, what: str, fix: str):
        super().__init__(what)
        self.what, self.fix = what, fix


@dataclass(frozen=True)
class Checkpoint:
    """One source, opened. `absent` are weight files that are on the Hub alone, `unread` those of
    its tokenizer, because an earlier source has the same.

    `views` are those of `tensors` that are parts of tensors of its files.

    `fingerprint` tells this source's content from another's: the Hub's commit, or a digest of
    sizes, times and headers. `note` is a line that a person should read.
    """

    reference: Reference
    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Location]
    fingerprint: str
    commit: str | None = None
    modified: int | None = None
    absent: dict[str, Remote] = field(default_factory=dict)
    note: str = ""
    views: dict[str, View] = field(default_factory=dict)
    unread: dict[str, Remote] = field(default_factory=dict)

    @property
    def is_adapter(self) -> bool:
        """Whether this is a PEFT adapter and not a whole model."""
        return "peft_type" in self.config


def open_checkpoint(reference: Reference, cache_dir: str | None = None) -> Checkpoint:
    """Open a model or adapter: read its config and headers.

    Raises:
        SourceProblem: it is missing, damaged, quantised, or not a model at all.
    """
    try:
        if reference.directory:
            return _open(reference, reference.directory, None)
        snapshot = hub.open_snapshot(reference, cache_dir)
        return _open(reference, snapshot.directory, snapshot)
    except HubError as error:
        raise SourceProblem(error.what, error.fix) from error
    except OSError as error:
        what = f"{error.filename or reference.text} cannot be read ({error.strerror})"
        raise SourceProblem(what, "check the path and its permissions") from error


def fetch(checkpoint: Checkpoint, names: Iterable[str], cache_dir: str | None) -> Checkpoint:
    """Download the files that hold the tensors `names`, if they are absent; open them again.

    Raises:
        ReadError: the download failed, or what came is not what the plan was made from.
    """
    files = {checkpoint.tensors[name].file.name for name in names} & set(checkpoint.absent)
    if not files:
        return checkpoint
    hub.fetch([checkpoint.absent[file] for file in files], cache_dir)
    tensors = dict(checkpoint.tensors)
    for file in files:
        path = checkpoint.directory / file
        try:
            found = _read_local_header(path)
            parts = checkpoint.views.items()
            found |= {name: view.at(found[view.of]) for name, view in parts if view.of in found}
        except (OSError, ValueError) as error:
            raise ReadError(f"{path}: {error}; download it again") from error
        for name, location in found.items():
            if name in tensors and tensors[name].file == path:
                if (location.dtype, location.shape) != (tensors[name].dtype, tensors[name].shape):
                    raise ReadError(f"{path}: {name} is not what the Hub said; run again")
                tensors[name] = location
    absent = {file: at for file, at in checkpoint.absent.items() if file not in files}
    return dataclasses.replace(checkpoint, tensors=tensors, absent=absent)


def fetch_vocabulary(checkpoint: Checkpoint, cache_dir: str | None) -> None:
    """Download the files of its tokenizer that are on the Hub alone.

    Raises:
        ReadError: the download failed.
    """
    if any(not (checkpoint.directory / name).exists() for name in checkpoint.unread):
        hub.fetch(checkpoint.unread.values(), cache_dir)


def streamed(checkpoint: Checkpoint) -> Checkpoint:
    """The same with every absent file's tensors to be read from the Hub, as they are asked for."""
    tensors = {
        name: dataclasses.replace(at, remote=checkpoint.absent.get(at.file.name))
        for name, at in checkpoint.tensors.items()
    }
    return dataclasses.replace(checkpoint, tensors=tensors)


def with_rows(checkpoint: Checkpoint, names: Iterable[str]) -> Checkpoint:
    """The same with those of `names` that `fused.row_name` gives to rows of its tensors."""
    views = rows_named(checkpoint.tensors, names)
    if not views:
        return checkpoint
    tensors = checkpoint.tensors | {n: v.at(checkpoint.tensors[v.of]) for n, v in views.items()}
    return dataclasses.replace(checkpoint, tensors=tensors, views=checkpoint.views | views)


def _open(reference: Reference, directory: Path, snapshot: hub.Snapshot | None) -> Checkpoint:
    listed = set(snapshot.files) if snapshot else set()
    partial = snapshot is not None and not listed
    names = listed | {path.name for path in directory.iterdir()}
    whole = "config.json" in names and any(
        name in names for weight in _WEIGHTS for name in (weight, f"{weight}.index.json")
    )  # many a training run leaves its base's config.json beside an adapter
    adapter = "adapter_config.json" in names and not whole
    config_name = "adapter_config.json" if adapter else "config.json"
    weights = _ADAPTER_WEIGHTS if adapter else _WEIGHTS
    if config_name not in names:
        raise _no_model(directory, names)
    config = _read_json(directory / config_name)
    family = config.get("model_type")
    if not adapter:
        try:
            config = normalise(config)
        except ValueError as error:
            raise SourceProblem(f"config.json: {error}", "repair it") from error
        if config.get("quantization_config") or config.get("compression_config"):
            how = config.get("quantization_config") or {}
            method = how.get("quant_method", "some") if isinstance(how, dict) else how
            raise SourceProblem(f"is quantised ({method})", _QUANTISED)
    files, index = _weight_files(directory, names, weights, partial)
    tensors: dict[str, Location] = {}
    newest = 0
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        found = _read_header(directory / file, snapshot)
        for name, location in found.items():
            if index is None or index.get(name) == file:
                tensors[name] = location
        for name, at in found.items():
            size, modified = at.stamp or (0, 0)
            digest.update(repr((file, size, name, at.dtype, at.shape, at.offset)).encode())
            newest = max(newest, modified)
    expected = {name for name, file in (index or {}).items() if file in files}
    if index is not None and (missing := sorted(expected - tensors.keys())):
        raise SourceProblem(
            f"its index names {missing[0]!r} in {index[missing[0]]}, which is not there"
            + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""),
            "download or save the model again",
        )
    layers, count = config.get("num_hidden_layers"), max(len(tensors), len(index or ()))
    if isinstance(layers, int) and layers > count:  # a claim that would cost memory to follow
        raise SourceProblem(
            f"config.json: num_hidden_layers is {layers}, its weights are {count} tensors",
            "use the weights and the config.json of one and the same model",
        )
    views: dict[str, View] = {}
    if not adapter:
        try:
            views = views_of(tensors, family, config)
        except ValueError as error:
            fix = "use the weights and the config.json of one and the same model"
            raise SourceProblem(str(error), fix) from error
    commit = snapshot.commit if snapshot else None
    fingerprint = commit or digest.hexdigest()
    on_hub = snapshot.files if snapshot else {}
    absent = {file: on_hub[file] for file in files if not (directory / file).exists()}
    note = snapshot.note if snapshot else ""
    unread = {
        name: on_hub[name]
        for name in hub.VOCABULARIES
        if name in on_hub and not (directory / name).exists()
    }
    return Checkpoint(
        reference=reference,
        directory=directory,
        config=config,
        tensors=with_views(tensors, views),
        fingerprint=fingerprint,
        commit=commit,
        modified=None if snapshot else newest,
        absent=absent,
        note=note,
        unread=unread,
        views=views,
    )


def _no_model(directory: Path, names: set[str]) -> SourceProblem:
    if any(name.endswith(".gguf") for name in names):
        return SourceProblem("holds GGUF files", _QUANTISED)
    return SourceProblem(
        f"holds no config.json ({directory})", "name a model directory in transformers' format"
    )


def _weight_files(
    directory: Path, names: set[str], weights: tuple[str, ...], partial: bool
) -> tuple[list[str], dict[str, str] | None]:
    """The weight files, and which holds which tensor where an index says so.

    A `partial` directory is a Hub's cache that holds what some merge needed: the files that it
    lacks are left out, and the plan refuses if it needs their tensors.
    """
    for weight in weights:
        index_name = f"{weight}.index.json"
        if index_name in names:
            index = _read_json(directory / index_name).get("weight_map")
            if not isinstance(index, dict) or not index:
                raise SourceProblem(f"{index_name} has no weight_map", "save the model again")
            for file in index.values():
                if not _is_plain_name(file):
                    raise SourceProblem(
                        f"{index_name} names {file!r}, which leaves its directory",
                        "do not use this model: its index is hostile or broken",
                    )
            files = sorted(set(index.values()))
            if partial and names & set(files):
                return [file for file in files if file in names], index
            for file in files:
                if file not in names:
                    raise SourceProblem(
                        f"{index_name} names {file}, which is not there", "download it again"
                    )
            return files, index
        if weight in names:
            return [weight], None
    if any(name.endswith(".gguf") for name in names):
        raise SourceProblem("holds its weights as GGUF only", _QUANTISED)
    raise SourceProblem(f"holds none of {', '.join(weights)}", "download the model's weights")


def _is_plain_name(file: object) -> bool:
    return (
        isinstance(file, str)
        and file not in ("", ".", "..")
        and "\0" not in file
        and PurePosixPath(file).name == file == PureWindowsPath(file).name
    )


def _read_header(path: Path, snapshot: hub.Snapshot | None) -> dict[str, Location]:
    try:
        if snapshot is None or path.exists():
            return _read_local_header(path)
        with open_remote(snapshot.files[path.name]) as remote:
            if path.suffix == ".safetensors":
                return safetensors_file.read_header(path, remote)
            return torch_file.read_header(path, remote)
    except ValueError as error:
        raise SourceProblem(f"{path.name}: {error}", "download or save the model again") from error


def _read_local_header(path: Path) -> dict[str, Location]:
    stat = path.stat()
    read = safetensors_file if path.suffix == ".safetensors" else torch_file
    stamp = (stat.st_size, stat.st_mtime_ns)
    return {
        name: dataclasses.replace(location, stamp=stamp)
        for name, location in read.read_header(path).items()
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SourceProblem(f"{path.name} is not JSON ({error})", "download it again") from error
    if not isinstance(value, dict):
        raise SourceProblem(f"{path.name} is not a JSON object", "download it again")
    return value
