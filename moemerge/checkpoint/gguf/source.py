"""A model in a GGUF file, opened: its config, its tensors by transformers' names, its tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moemerge.checkpoint.fused import View, views_of, with_views
from moemerge.checkpoint.gguf.blocks import QUANTISED
from moemerge.checkpoint.gguf.header import Field, Header, read_header
from moemerge.checkpoint.gguf.imatrix import importances, is_imatrix
from moemerge.checkpoint.gguf.kinds import FREQUENCIES, Kind, config_of, kind_of, scaling_of
from moemerge.checkpoint.gguf.tokenizer import files_of as tokenizer_files
from moemerge.checkpoint.location import Location, Stamp, read_values
from moemerge.hub import Remote, open_remote


class IsImatrix(Exception):
    """A file that is an importance matrix, with its `tensors`."""

    def __init__(self, tensors: dict[str, Location]):
        super().__init__("it is an importance matrix, not a model")
        self.tensors = tensors


_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_MOST_FILES = 10_000


@dataclass(frozen=True)
class GgufModel:
    """What is read of a file (or of the files of a split one).

    `raw` has the tensors under their own names, by file; `tensors` those under transformers' names,
    with rows in transformers' order, and `views` says which of them are parts of a tensor under
    transformers' name. `directory` holds the tokenizer's files.
    """

    kind: Kind
    fields: dict[str, Field]
    config: dict[str, Any]
    raw: dict[str, dict[str, Location]]
    tensors: dict[str, Location]
    directory: Path
    path: Path
    views: dict[str, View]

    @property
    def digest(self) -> str:
        """A digest of all fields."""
        made = hashlib.blake2b(digest_size=16)
        for name, field in self.fields.items():
            made.update(f"{name}\0{len(field.raw)}\0".encode() + field.raw)
        return made.hexdigest()

    @property
    def note(self) -> str:
        """What a person should know of its precision; empty if nothing was lost."""
        sizes: dict[str, int] = {}
        for at in self.tensors.values():
            if at.encoding.name in QUANTISED:
                sizes[at.encoding.name] = sizes.get(at.encoding.name, 0) + at.nbytes
        most = sorted(sizes, key=lambda name: -sizes[name])
        return f"quantised ({', '.join(most)}): what that lost stays lost" if most else ""


def open_gguf(path: Path, remotes: Mapping[str, Remote] = MappingProxyType({})) -> GgufModel:
    """Read the headers of a file, or of all files of a split one.

    A file that is not there is read on the Hub, if `remotes` has its name.

    Raises:
        IsImatrix: it is no model but an importance matrix.
        ValueError: the file is damaged, hostile or of a kind that is not read; says which.
        OSError: it cannot be read.
    """
    headers = {file: _read(file, remotes.get(file.name)) for file in files_of(path)}
    header = _joined(list(headers.values()))
    if is_imatrix(header):
        raise IsImatrix(importances(header))
    kind = kind_of(header)
    config = config_of(header, kind)
    tensors = dict(_named(header, kind, config))
    views = views_of(tensors, kind.family, config)
    tensors = with_views(tensors, views)
    if count := sum(name.startswith("blk.") for name in header.tensors):
        layers = config["num_hidden_layers"]
        if layers > count:  # to go on would cost memory
            raise ValueError(f"its {kind.name}.block_count is {layers}, it has {count} tensors")
    at = header.tensors.get(FREQUENCIES)
    if at and not at.file.exists():
        at = dataclasses.replace(at, remote=remotes[at.file.name])
    values = read_values(at, 0, at.shape[0]).tolist() if at else None
    config |= scaling_of(header, kind, values)
    raw = {file.name: one.tensors for file, one in headers.items()}
    folder = _directory(header)
    return GgufModel(kind, header.fields, config, raw, tensors, folder, path, views)


def files_of(path: Path) -> list[Path]:
    """All files of a model; a split one is named by its first file."""
    found = _SPLIT.fullmatch(path.name)
    if not found:
        return [path]
    number, count = int(found[2]), int(found[3])
    if number != 1 or not 1 <= count <= _MOST_FILES:
        raise ValueError(f"it is part {number} of {count}: name the first part, -00001-of-…")
    names = (f"{found[1]}-{one:05d}-of-{count:05d}.gguf" for one in range(1, count + 1))
    return [path.with_name(name) for name in names]


def _read(path: Path, remote: Remote | None) -> Header:
    if not path.is_file() and remote:
        with open_remote(remote) as file:
            return read_header(path, file)
    if not path.is_file():
        raise ValueError(f"its part {path.name} is not there")
    stamp = Stamp.of(path.stat())
    header = read_header(path)
    tensors = {name: dataclasses.replace(at, stamp=stamp) for name, at in header.tensors.items()}
    return Header(header.fields, tensors)


def _joined(headers: list[Header]) -> Header:
    """The parts of a split model as one."""
    first, tensors = headers[0], dict[str, Location]()
    for number, header in enumerate(headers):
        said = header.value("split.no", int, 0), header.value("split.count", int, 0)
        if len(headers) > 1 and said != (number, len(headers)):
            raise ValueError(
                f"its part {number + 1} says that it is part {said[0] + 1} of {said[1]}"
            )
        if len(headers) == 1 and said[1] > 1:
            raise ValueError(f"it is one part of {said[1]}; keep the parts' names, -00001-of-…")
        for name, at in header.tensors.items():
            if name in tensors:
                raise ValueError(f"two of its parts have the tensor {name!r}")
            tensors[name] = at
    if not tensors:
        raise ValueError("it has no tensors: a vocabulary alone is no model")
    fields = {name: field for name, field in first.fields.items() if not name.startswith("split.")}
    return Header(fields, tensors)


def _named(header: Header, kind: Kind, config: dict[str, Any]) -> Iterator[tuple[str, Location]]:
    """Its tensors by transformers' names."""
    for name, at in header.tensors.items():
        if name == FREQUENCIES:
            continue
        ours = kind.ours(name)
        if ours is None:
            raise ValueError(f"it has {name}, which a {kind.family} does not have")
        head = config["head_dim"] if kind.is_turned(name) else 0
        if head and at.shape[0] % head:
            raise ValueError(f"{name} has {at.shape[0]} rows, no multiple of a head's {head}")
        shape = kind.shape(name, at.shape)
        yield ours, dataclasses.replace(at, neighbours=head, shape=shape)


@lru_cache(maxsize=1)
def _shelf() -> tempfile.TemporaryDirectory[str]:
    """Where tokenizers' files are while this process runs."""
    return tempfile.TemporaryDirectory(prefix="moemerge-")


def _directory(header: Header) -> Path:
    """A folder with the tokenizer's files; equal tokenizers share one."""
    made = hashlib.blake2b(digest_size=16)
    for name, field in header.fields.items():
        if name.startswith("tokenizer."):
            made.update(name.encode() + field.raw)
    folder = Path(_shelf().name) / made.hexdigest()
    if not folder.exists():
        content = tokenizer_files(header)
        folder.mkdir()
        for name, data in content.items():
            (folder / name).write_bytes(data)
    return folder
