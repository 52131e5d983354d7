"""The fingerprint of a source's content, from a part of every tensor.

Times do not count: a source that was copied or touched is the same source.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from moemerge.checkpoint.location import Location

SAMPLED = "2:"
"""The beginning of a directory's fingerprint; earlier versions used sizes and headers."""

_BLOCK_BYTES = 4096
_BLOCKS = 1 << 11
"""How many blocks of a source are read; at least one of each tensor."""

_MOST_OF_ONE = 8
_THREADS = 4
_TENSORS_A_TASK = 64
_SAVERS = frozenset({"_name_or_path", "transformers_version"})
"""Keys of a config.json about the program that wrote it."""


def of_headers(tensors: Mapping[str, Mapping[str, Location]]) -> str:
    """A digest of the files' sizes and headers, by their names."""
    digest = _digest()
    for file, found in tensors.items():
        for name, at in found.items():
            size = at.stamp[0] if at.stamp else 0
            digest.update(repr((file, size, name, at.encoding.name, at.shape, at.offset)).encode())
    return digest.hexdigest()


def of_content(
    tensors: Mapping[str, Mapping[str, Location]],
    headers: str,
    config: Mapping[str, Any],
    whole: bool,
) -> str:
    """A digest of `headers`, config, and blocks of every tensor; of all bytes if `whole`.

    Training changes a whole tensor, and so some value of each block. A change of a few rows may
    miss all blocks. A tensor's name decides where its blocks are.

    Raises:
        OSError: a file cannot be read.
    """
    said = {key: value for key, value in config.items() if key not in _SAVERS}
    digest = _digest(headers, json.dumps(said, sort_keys=True))
    count = sum(map(len, tensors.values()))
    each = 0 if whole else min(max(_BLOCKS // max(count, 1), 1), _MOST_OF_ONE)
    with ThreadPoolExecutor(_THREADS) as pool:
        for part in pool.map(lambda task: _sample(task[0], task[1], each), _tasks(tensors)):
            digest.update(part)
    return SAMPLED + digest.hexdigest()


def of_files(paths: Iterable[Path]) -> str:
    """A digest of whole files, by their names; files that cannot be read are skipped."""
    digest = _digest()
    for path in paths:
        with suppress(OSError):
            content = path.read_bytes()
            digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _tasks(
    tensors: Mapping[str, Mapping[str, Location]],
) -> Iterator[tuple[Path, Sequence[tuple[str, Location]]]]:
    """Some tensors of one file after another."""
    for found in tensors.values():
        items = list(found.items())
        for at in range(0, len(items), _TENSORS_A_TASK):
            some = items[at : at + _TENSORS_A_TASK]
            yield some[0][1].file, some


def _sample(path: Path, tensors: Sequence[tuple[str, Location]], blocks: int) -> bytes:
    """A digest of `blocks` blocks of each tensor; of the whole tensor if `blocks` is 0."""
    digest = _digest()
    with path.open("rb", buffering=0) as file:
        for name, at in tensors:
            for start, stop in _stretches(name, at, blocks):
                _read(file, start, stop - start, digest)
    return digest.digest()


def _stretches(name: str, at: Location, blocks: int) -> list[tuple[int, int]]:
    """The places of a tensor's blocks in its file: one, at random, in each equal part of it."""
    end = at.offset + at.nbytes
    if not blocks or at.nbytes <= blocks * _BLOCK_BYTES:
        step = 1 << 20
        return [(start, min(start + step, end)) for start in range(at.offset, end, step)]
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    part = at.nbytes // blocks
    places = [
        at.offset + number * part + (key * (number + 1)) % (part - _BLOCK_BYTES + 1)
        for number in range(blocks)
    ]
    return [(place, place + _BLOCK_BYTES) for place in places]


def _read(file: BinaryIO, start: int, nbytes: int, digest: hashlib.blake2b) -> None:
    file.seek(start)
    while nbytes > 0 and (found := file.read(nbytes)):
        digest.update(found)
        nbytes -= len(found)


def _digest(*parts: str) -> hashlib.blake2b:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass"))
    return digest
