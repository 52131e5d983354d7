"""What config.json claims and the tensors decide: whether the head is the embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from moemerge.checkpoint.remote import Remote
from moemerge.checkpoint.tensors import Location, read_bytes
from moemerge.slots import EMBEDDING, HEAD

TIED = "tie_word_embeddings"

UNTIED = (
    f"{HEAD} is not the embeddings, though config.json says {TIED}: true; "
    "read as transformers 5 reads it, with a head of its own"
)
"""What a person should know of a model that is not tied after all."""

_UNSEEN = f"{HEAD} is in a file that is not here; taken to be the embeddings, as config.json says"

_PLACES, _SAMPLE = 16, 4096
_BLOCK = 1 << 22


def settle(
    config: dict[str, Any],
    tensors: Mapping[str, Location],
    absent: Mapping[str, Remote],
    index: Collection[str] = (),
) -> list[str]:
    """Make the config of a model say what its tensors are; returns what a person should know.

    `absent` files are on the Hub alone; the `index` may name tensors of files that are nowhere.

    Raises:
        ReadError: the files cannot be read.
    """
    if config.get(TIED) and not _is_tied(tensors, absent):
        config[TIED] = False
        return [UNTIED]
    if config.get(TIED) and HEAD in index and HEAD not in tensors:
        return [_UNSEEN]
    return []


def is_doubtful(
    config: Mapping[str, Any], tensors: Mapping[str, Location], absent: Mapping[str, Remote]
) -> bool:
    """Whether a model is tied by a few samples of its embeddings and head, and no more."""
    both = [tensors[name].file.name for name in (EMBEDDING, HEAD) if name in tensors]
    return bool(config.get(TIED)) and len(both) == 2 and any(file in absent for file in both)


def is_equal(one: Location, two: Location) -> bool:
    """Whether two tensors of one dtype and shape hold the same bytes; read to the first difference.

    Raises:
        ReadError: one cannot be read.
    """
    return _same_place(one, two) or all(
        read_bytes(one, at, size) == read_bytes(two, at, size)
        for at in range(0, one.nbytes, _BLOCK)
        for size in [min(_BLOCK, one.nbytes - at)]
    )


def _is_tied(tensors: Mapping[str, Location], absent: Mapping[str, Remote]) -> bool:
    """Whether there is no other head than the embeddings.

    So transformers 5 decides (`PreTrainedModel.tie_weights`): where a file holds a head too, the
    model is tied if both are equal. A few samples of both are read first, for another head nearly
    always shows there; then all, up to the first difference. Of files on the Hub, the samples alone
    are read: see `is_doubtful`.

    Raises:
        ReadError: the files cannot be read.
    """
    if not {EMBEDDING, HEAD} <= tensors.keys():
        return True
    one, two = (_found(tensors[name], absent) for name in (EMBEDDING, HEAD))
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    return _alike(one, two) and bool(one.remote or two.remote or is_equal(one, two))


def _alike(one: Location, two: Location) -> bool:
    """Whether they are equal in some places from end to end."""
    size = min(_SAMPLE, one.nbytes)
    last = one.nbytes - size
    places = {last * number // (_PLACES - 1) for number in range(_PLACES)}
    return _same_place(one, two) or all(
        read_bytes(one, at, size) == read_bytes(two, at, size) for at in sorted(places)
    )


def _same_place(one: Location, two: Location) -> bool:
    """Whether they are one stretch of a file, as tied tensors are in most `.bin` files."""
    return (one.file, one.offset, one.negative) == (two.file, two.offset, two.negative)


def _found(at: Location, absent: Mapping[str, Remote]) -> Location:
    return dataclasses.replace(at, remote=absent.get(at.file.name))
