"""Where each row of the mixture's embedding and head comes from: a model's row, or a mean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TypeAlias

from moemerge.checkpoint import Donor
from moemerge.errors import Findings
from moemerge.text.donor_tokens import Request
from moemerge.text.vocabulary import MeanRow, Rows, Vocabulary, size_of
from moemerge.tokenizer import Tokens, open_tokenizer, pieces, shown

Origin: TypeAlias = tuple[Donor, int | tuple[int, ...]]
"""A model and its row, or the rows whose mean is taken; `()` is for rows from all over it."""

_SPREAD = 16
"""How many rows are averaged for a row without a token."""


def origins(request: Request, tokens: Tokens, new: set[str]) -> Iterator[Origin]:
    """Where each row of the vocabulary comes from, by ids in order.

    A token that the base model has takes the base model's row; otherwise the row of the owner, or
    of the first expert that has the token. `new` are the added tokens.
    """
    base, owner, own = request.base, request.owner, request.tokens_of(request.base)
    donors = [owner, *(donor for donor in request.experts if donor is not owner)]
    read = [(donor, request.tokens[donor.model.directory]) for donor in donors]
    known = [(donor, theirs) for donor, theirs in read if isinstance(theirs, Tokens)]
    spelled = {number: token for token, number in reversed(tokens.ordered)}
    reader, means = open_tokenizer(own), list[str]()
    for number in range(max(tokens.size, size_of(owner))):
        token = spelled.get(number)
        stays = token is None or (owner is base and token not in new)
        if stays and number < size_of(owner):
            yield owner, number
            continue
        text = None if token is None else tokens.text_of(token)
        places = (
            (donor, found)
            for donor, theirs in [(base, own), *known]
            if token is not None and (found := theirs.find(tokens, token)) is not None
        )
        place = next((at for at in places if at[1] < size_of(at[0])), None)
        if place is None:
            means.append(token or "")
        own_pieces = pieces(reader, own, text) if text and place is None else []
        yield place or (base, tuple(row for row in own_pieces if row < size_of(base)))
    if means:
        request.findings.note(
            f"vocabulary: {len(means)} tokens that no model has begin as the mean of their "
            f"pieces' rows ({shown(means)}): train the result on text that has them"
        )


def with_rows(
    vocabulary: Vocabulary, places: list[Origin], multiple: int, findings: Findings
) -> Vocabulary:
    """The vocabulary with rows from these origins, padded to a `multiple` of rows."""
    size = len(places)
    wanted = -(-size // multiple) * multiple
    if wanted > size:
        findings.note(f"vocabulary: padded from {size} to {wanted} rows")
    elif multiple > 1:
        findings.note(f"pad_vocabulary has no effect: {size} is a multiple of {multiple}")
    rows = tuple(_runs([*places, *[(vocabulary.base, ())] * (wanted - size)]))
    return replace(vocabulary, rows=rows, config={**vocabulary.config, "vocab_size": wanted})


def padded(vocabulary: Vocabulary, multiple: int, findings: Findings) -> Vocabulary:
    """The base model's rows, padded to a `multiple` of rows; unchanged if that is 1."""
    if multiple == 1:
        return vocabulary
    base = vocabulary.base
    rows: list[Origin] = [(base, row) for row in range(size_of(base))]
    return with_rows(vocabulary, rows, multiple, findings)


def _runs(places: Iterable[Origin]) -> Iterator[Rows | MeanRow]:
    """Join neighbouring rows of one model to one `Rows`."""
    donor, first, end = None, 0, 0
    for whose, at in places:
        if donor is not None and (whose is not donor or at != end):
            yield Rows(donor, first, end)
            donor = None
        if isinstance(at, tuple):
            size = size_of(whose)
            spread = range(0, size, -(-size // _SPREAD))
            yield MeanRow(whose, at or tuple(spread))
        elif donor is None:
            donor, first, end = whose, at, at + 1
        else:
            end += 1
    if donor is not None:
        yield Rows(donor, first, end)
