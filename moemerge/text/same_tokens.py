"""The ids, and so the rows of embedding and head, that mean the same token in two models."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

from moemerge.checkpoint import Donor
from moemerge.families import EMBEDDING, HEAD
from moemerge.text.vocabulary import Vocabulary, size_of
from moemerge.tokenizer import (
    ADDED_FILE,
    CONFIG_FILE,
    TOKENIZER_FILE,
    Token,
    Tokens,
    parse_tokens,
    read_object,
    read_tokens,
)

_MOST_STRETCHES = 1 << 10
"""More differing ids than renamed tokens explain: it is another tokenizer, although some ids agree.
"""


@dataclass(frozen=True)
class Shared:
    """The rows of a base model's embedding and head that an expert has for the same tokens.

    `left` says which of the expert's rows are not part of a mean, and why; empty if there are none.
    """

    rows: tuple[range, ...]
    left: str = ""


def shared_rows(base: Donor, expert: Donor) -> Shared:
    """Compare each id. If the tokens cannot be compared, no row is shared."""
    tied, ties = (bool(d.model.config.get("tie_word_embeddings")) for d in (base, expert))
    if tied != ties:
        its, the = ("a", "none") if tied else ("no", "one")
        return _none(f"it has {its} head of its own, and the base has {the}")
    if obstacle := expert.obstacle((EMBEDDING, HEAD)):
        return _none(f"{obstacle[0]}: {obstacle[1]}")
    size = size_of(base)
    both = range(min(size, size_of(expert)))
    where = [_directory(donor) for donor in (base, expert)]
    apart: list[int] = []
    shown = ""
    if where[0] != where[1]:
        try:
            ours, theirs = (_read(donor) for donor in (base, expert))
        except ValueError as error:
            return _none(f"its tokens cannot be compared with the base's ({error})")
        apart = [number for number in ids_apart(ours, theirs) if number in both]
        if apart:
            here, there = (_spelled(tokens, apart[0]) for tokens in (ours, theirs))
            shown = f"id {apart[0]} is {here} in the base, {there} in it"
    rows = tuple(
        range(before + 1, after) for before, after in pairwise([-1, *apart, len(both)])
        if after > before + 1
    )  # fmt: skip
    if len(rows) > _MOST_STRETCHES:
        return _none(f"it has another tokenizer ({shown})")
    left = size - sum(map(len, rows))
    why = f"other tokens ({shown})" if shown else f"it has {len(both)} rows"
    which = f"{left} row{'s' * (left > 1)} of embeddings and head"
    return Shared(rows, f"{which} not in the body's mean: {why}" if left else "")


def _none(why: str) -> Shared:
    return Shared((), f"embeddings and head not in the body's mean: {why}")


def other_ids(vocabulary: Vocabulary, donor: Donor) -> frozenset[int]:
    """The ids that mean another token in the donor than in the mixture, or exist in only one of
    them.

    Raises:
        ValueError: one of the tokenizers cannot be read.
    """
    if vocabulary.directory == _directory(donor) and not vocabulary.written:
        return frozenset()
    ours = parse_tokens(vocabulary.tokenizer())
    return frozenset(ids_apart(ours, _read(donor)))


def ids_apart(ours: Tokens, theirs: Tokens) -> list[int]:
    """The ids, in order, that do not mean the same token in both; tokens are compared by their
    text."""
    if ours is theirs:
        return []
    alike, here, there = ours.spelling == theirs.spelling, _by_id(ours), _by_id(theirs)

    def same(number: int) -> bool:
        one, other = here.get(number, ()), there.get(number, ())
        if alike and one == other and all((t in ours.added) == (t in theirs.added) for t in one):
            return True
        return {*map(ours.bytes_of, one)} == {*map(theirs.bytes_of, other)}

    return [number for number in sorted(here.keys() | there.keys()) if not same(number)]


def _directory(donor: Donor) -> Path:
    """The directory of the tokenizer that the donor was trained with: an adapter may have its
    own."""
    own = donor.adapter.checkpoint.directory if donor.adapter else None
    return own if own and (own / TOKENIZER_FILE).is_file() else donor.model.directory


def _read(donor: Donor) -> Tokens:
    """The tokens of a directory by all its files, because a program may name added tokens in
    another file.

    Raises:
        ValueError: they cannot be read.
    """
    directory = _directory(donor)
    tokens = read_tokens(directory)
    told = dict(read_object(directory / ADDED_FILE))
    listed = read_object(directory / CONFIG_FILE).get("added_tokens_decoder")
    for number, token in (listed if isinstance(listed, dict) else {}).items():
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and number.isdecimal():
            told[text] = int(number)
    more = {text: number for text, number in told.items() if type(number) is int}
    if more.keys() <= tokens.ids.keys():
        return tokens
    added = {text: Token(text) for text in more.keys() - tokens.ids.keys()}
    return dataclasses.replace(tokens, ids={**more, **tokens.ids}, added={**added, **tokens.added})


def _by_id(tokens: Tokens) -> dict[int, tuple[str, ...]]:
    grouped = groupby(tokens.ordered, key=lambda item: item[1])
    return {number: tuple(token for token, _ in items) for number, items in grouped}


def _spelled(tokens: Tokens, number: int) -> str:
    return " and ".join(map(repr, _by_id(tokens).get(number, ()))) or "no token"
