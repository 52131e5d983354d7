"""Claims of config.json, checked against the tensors: a tied head, quantised weights, token ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from moemerge.checkpoint.location import FLOATS, Location, read_bytes
from moemerge.families import EMBEDDING, HEAD
from moemerge.hub import Remote
from moemerge.tokenizer import IDS, within

TIED = "tie_word_embeddings"

UNTIED = (
    f"{HEAD} is not the embeddings, though config.json says {TIED}: true; "
    "read as transformers 5 reads it, with a head of its own"
)
"""The note on a model whose config says `tied` but whose head differs from the embeddings."""

_UNSEEN = f"{HEAD} is in a file that is not here; taken to be the embeddings, as config.json says"

_PLAIN = ("F64", *FLOATS.values())
_LEAVES = (
    "weight", "bias", "inv_freq", "gate_up_proj", "down_proj", "e_score_correction_bias"
)  # fmt: skip
"""The last words of plain tensors' names; quantised models have `qweight`, `SCB` or scales."""

_PLACES, _SAMPLE = 16, 4096
_BLOCK = 1 << 22


def settle(
    config: dict[str, Any],
    tensors: Mapping[str, Location],
    absent: Mapping[str, Remote],
    index: Collection[str] = (),
) -> list[str]:
    """Change the config of a model to say what its tensors are; returns notes for a person.

    `absent` files are only on the Hub. The `index` may name tensors of files that do not exist.

    Raises:
        ReadError: the files cannot be read.
    """
    notes = [*_drop_code(config), *_drop_ids(config)]
    if config.get(TIED) and not _is_tied(tensors, absent):
        config[TIED] = False
        notes.append(UNTIED)
    if config.get(TIED) and HEAD in index and HEAD not in tensors:
        notes.append(_UNSEEN)
    return notes


def drop_quantisation(config: dict[str, Any], tensors: Mapping[str, Location]) -> Iterator[str]:
    """Remove the config's quantisation keys if all weights are plain floats; yields notes for a
    person.

    Raises:
        ValueError: the model is quantised; says with what.
    """
    for key in ("quantization_config", "compression_config"):
        said = config.pop(key, None)
        if not said:
            continue
        method = str(said.get("quant_method", "some") if isinstance(said, dict) else said)
        for name, at in tensors.items():
            if at.dtype not in _PLAIN or name.rpartition(".")[2] not in _LEAVES:
                raise ValueError(f"is quantised ({method}): it holds {name} of {at.dtype}")
        yield f"{key} ({method}) is not used: every tensor is of plain floats"


def _drop_code(config: dict[str, Any]) -> Iterator[str]:
    """Remove keys that name program code, because the code is not copied."""
    found = [key for key in ("auto_map", "custom_pipelines", "trust_remote_code") if key in config]
    for key in found:
        del config[key]
    if found:
        kind = config.get("saved_as", config.get("model_type"))
        yield f"{' and '.join(found)} of config.json: code of its own is not used; read as a {kind}"


def _drop_ids(config: dict[str, Any]) -> Iterator[str]:
    """Remove ids of special tokens for which the embeddings have no row."""
    rows = config.get("vocab_size")
    for key in IDS:
        if key in config and type(rows) is int:
            kept = within(config[key], rows)
            if kept != config[key]:
                yield f"{key} is {config[key]}, the vocabulary has {rows} ids: written as {kept}"
                config[key] = kept


def is_doubtful(
    config: Mapping[str, Any], tensors: Mapping[str, Location], absent: Mapping[str, Remote]
) -> bool:
    """Whether only a few samples of embeddings and head show that a model is tied."""
    both = [tensors[name].file.name for name in (EMBEDDING, HEAD) if name in tensors]
    return bool(config.get(TIED)) and len(both) == 2 and any(file in absent for file in both)


def is_equal(one: Location, two: Location) -> bool:
    """Whether two tensors of one dtype and shape hold the same bytes; reads up to the first
    difference.

    Raises:
        ReadError: one cannot be read.
    """
    return _same_place(one, two) or all(
        read_bytes(one, at, size) == read_bytes(two, at, size)
        for at in range(0, one.nbytes, _BLOCK)
        for size in [min(_BLOCK, one.nbytes - at)]
    )


def _is_tied(tensors: Mapping[str, Location], absent: Mapping[str, Remote]) -> bool:
    """Whether the embeddings are the only head.

    transformers 5 decides in the same way (`PreTrainedModel.tie_weights`): if a file holds a head
    too, the model is tied if both are equal. A few samples of both are read first, because a
    different head nearly always shows there; then all, up to the first difference. Of files on the
    Hub only the samples are read: see `is_doubtful`.

    Raises:
        ReadError: the files cannot be read.
    """
    if not {EMBEDDING, HEAD} <= tensors.keys():
        return True
    one, two = (_found(tensors[name], absent) for name in (EMBEDDING, HEAD))
    if (one.encoding, one.shape) != (two.encoding, two.shape):
        return False
    return _alike(one, two) and bool(one.remote or two.remote or is_equal(one, two))


def _alike(one: Location, two: Location) -> bool:
    """Whether the tensors are equal in samples from their whole length."""
    size = min(_SAMPLE, one.nbytes)
    last = one.nbytes - size
    places = {last * number // (_PLACES - 1) for number in range(_PLACES)}
    return _same_place(one, two) or all(
        read_bytes(one, at, size) == read_bytes(two, at, size) for at in sorted(places)
    )


def _same_place(one: Location, two: Location) -> bool:
    """Whether both are the same stretch of one file, as tied tensors are in most `.bin` files."""
    return (one.file, one.offset, one.negative) == (two.file, two.offset, two.negative)


def _found(at: Location, absent: Mapping[str, Remote]) -> Location:
    return dataclasses.replace(at, remote=absent.get(at.file.name))
