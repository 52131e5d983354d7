"""Which vocabulary a config asks for: a tokenizer, what is added to it, and each row's origin."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moemerge.checkpoint import Donor, places
from moemerge.config import MergeConfig
from moemerge.errors import Findings, nearest
from moemerge.text.vocabulary import MeanRow, Rows, Vocabulary, size_of
from moemerge.tokenizer import (
    GENERATION_FILE,
    Token,
    Tokens,
    chat_template,
    cut_by,
    missing,
    open_tokenizer,
    parse_tokens,
    pieces,
    read_object,
    read_tokens,
    shown,
    unknown_to_converter,
    unreadable,
    with_added,
    with_added_tokens,
    with_template,
)

BASE, UNION = "base", "union"

_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SPREAD = 16
"""Rows that a row without a token is the mean of."""


def choose(
    config: MergeConfig,
    base: Donor,
    donors: Sequence[Donor | None],
    findings: Findings,
) -> Vocabulary:
    """The vocabulary that the config asks for; what is wrong with it is recorded.

    `donors` are the experts, and then the shared ones. `tokenizer: union` adds what their
    tokenizers have and the base model's has not, in their order, behind the rows that were there
    (as Cui et al. 2023, Chinese-LLaMA, https://arxiv.org/abs/2304.08177, extend theirs); a new
    token's rows are those of the first expert that has it. A token that no model has begins as the
    mean of its pieces' rows (Koto et al. 2021, https://arxiv.org/abs/2109.04607). With
    `pad_vocabulary`, rows without a token make the size round. These are means too, of rows spread
    over the vocabulary: a mean's probability is at most the mean of theirs, where a row of zeros
    gives logit 0, more than any token has in a model whose logits are all negative (Hewitt 2021,
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
    """
    refused = len(findings.problems)
    owner = _owner(config, base, donors, findings)
    extra = _extra(config, findings)
    if config.pad_vocabulary < 1:
        what, fix = f"is {config.pad_vocabulary}", "write what the size is to be a multiple of: 64"
        findings.problem(config.where("pad_vocabulary"), what, fix)
    plain = Vocabulary(base, base.model.directory)
    if owner is None or len(findings.problems) > refused:
        return plain
    experts = [donor for donor in donors if donor]
    choice = _Choice(config, base, experts, findings)
    if owner is base and config.tokenizer != UNION and not config.extra_tokens:
        return choice.padded(plain) if config.pad_vocabulary > 1 else plain
    try:
        return choice.made(owner, extra)
    except _Unknown as error:
        who, reason = error.args
        fix = "add its tokenizer.json, or use tokenizer: base and no extra_tokens"
        findings.problem(who.where, f"its tokens cannot be used: {reason}", fix)
        return plain


_Place = tuple[Donor, int | tuple[int, ...]]
"""A row of a donor, or the mean of some; of none, of rows spread over all of them."""


class _Unknown(Exception):
    """A donor whose tokens cannot be known, and why."""


def _owner(
    config: MergeConfig, base: Donor, donors: Sequence[Donor | None], findings: Findings
) -> Donor | None:
    """Whose tokenizer it is; the base model's where all are joined."""
    said = config.tokenizer
    if said in (BASE, UNION, config.base_model):
        return base
    for donor, expert in zip(donors, (*config.experts, *config.shared_experts), strict=True):
        if said in (expert.name, expert.source_model, donor.name if donor else ""):
            return donor
    names = [donor.name for donor in donors if donor]
    what = f"{said!r} is no expert of this config"
    findings.problem(config.where("tokenizer"), what, nearest(said, [BASE, UNION, *names]))
    return None


def _extra(config: MergeConfig, findings: Findings) -> list[Token] | Tokens:
    """What `extra_tokens` names: some tokens, or all of a tokenizer."""
    said, where = config.extra_tokens, config.where("extra_tokens")
    if not isinstance(said, str):
        return _listed(said, where, "item {}", findings) if said else []
    path = next((place for place in places(said, config.folder) if place.is_file()), None)
    if path is None:
        fix = "name a tokenizer.json or a file of one token a line"
        findings.problem(where, f"{said} is no file", fix)
        return []
    try:
        content = path.read_bytes()
        if path.suffix == ".json":
            return parse_tokens(content)
        return _listed(content.decode("utf-8-sig").splitlines(), where, "line {}", findings)
    except OSError as error:
        what = f"{said} cannot be read ({error.strerror})"
        findings.problem(where, what, "check its permissions")
    except UnicodeDecodeError:
        findings.problem(where, f"{said} is not UTF-8 text", "save it as UTF-8, one token a line")
    except ValueError as error:
        fix = "name one that the tokenizers library has written, or a text file"
        findings.problem(where, f"{said}: {error}", fix)
    return []


def _listed(texts: Iterable[str], where: str, place: str, findings: Findings) -> list[Token]:
    seen: dict[str, int] = {}
    for number, text in enumerate(texts, start=1):
        at = place.format(number)
        if not text.strip():
            findings.problem(where, f"{at} is empty", "write a token, or remove it")
        elif text in seen:
            what = f"{at}, {text!r}, is {place.format(seen[text])} too"
            findings.problem(where, what, "keep one of them")
        else:
            seen[text] = number
    if not seen:
        findings.problem(where, "names no token", "add some, or remove it")
    return [Token(text) for text in seen]


class _Choice:
    def __init__(
        self,
        config: MergeConfig,
        base: Donor,
        experts: list[Donor],
        findings: Findings,
    ):
        self.config, self.base, self.experts, self.findings = config, base, experts, findings
        self.known: dict[Path, Tokens] = {}

    def made(self, owner: Donor, extra: list[Token] | Tokens) -> Vocabulary:
        """The owner's tokenizer with all that is added to it."""
        own = self._tokens(self.base)
        for donor in (self.base, owner):
            highest = self._tokens(donor).size - 1
            if highest >= size_of(donor) + len(self._tokens(donor).ids):
                raise _Unknown(donor, f"one has the id {highest}")
        tokens, more = self._extended(self._tokens(owner), extra, owner)
        directory = owner.model.directory
        try:
            written = with_added_tokens(directory, tokens, more) if more else {}
            if self.config.tokenizer == UNION:
                written = self._with_template(written, tokens)
        except ValueError as error:
            raise _Unknown(owner, str(error)) from error
        config = {} if owner is self.base else _special_ids(owner)
        kept = Vocabulary(self.base, directory, written, config)
        if owner is self.base and not more:
            return self.padded(kept) if self.config.pad_vocabulary > 1 else kept
        places = [*self._places(tokens, own, owner, {token.text for token in more})]
        return self._with_rows(kept, places)

    def padded(self, kept: Vocabulary) -> Vocabulary:
        """The base model's rows, and some more without a token."""
        size = size_of(self.base)
        return self._with_rows(kept, [(self.base, row) for row in range(size)])

    def _tokens(self, donor: Donor) -> Tokens:
        directory = donor.model.directory
        if directory not in self.known:
            try:
                self.known[directory] = read_tokens(directory)
            except ValueError as error:
                raise _Unknown(donor, str(error)) from error
        return self.known[directory]

    def _extended(
        self, tokens: Tokens, extra: list[Token] | Tokens, owner: Donor
    ) -> tuple[Tokens, list[Token]]:
        """The tokenizer with what the config adds to it, and what that is.

        A piece of another tokenizer is added only where its text is then read as one token, and no
        token that was there is cut by it.
        """
        union = self.config.tokenizer == UNION
        others = [self._tokens(donor) for donor in self.experts] if union else []
        wanted: dict[str, Token] = {}
        optional: set[str] = set()
        unfit: set[bytes] = set()
        for other in [*others, *([extra] if isinstance(extra, Tokens) else [])]:
            theirs, left = missing(tokens, other)
            new = {token.text: token for token in theirs if token.text not in wanted}
            optional |= new.keys() - other.added.keys()
            wanted |= new
            unfit |= left
        named = {} if isinstance(extra, Tokens) else {token.text: token for token in extra}
        there = [text for text in named if tokens.has(text)]
        if there:
            line = f"extra_tokens: {len(there)} are in the tokenizer already ({shown(there)})"
            self.findings.note(line)
        wanted |= {text: named[text] for text in named if text not in {*there, *wanted}}
        try:
            made, kept = _sound(tokens, wanted, optional - named.keys())
            cut = cut_by(tokens, made) if kept else {}
        except ValueError as error:
            raise _Unknown(owner, str(error)) from error
        lost = wanted.keys() - {token.text for token in kept}
        if wrong := sorted(lost & named.keys()):
            what = f"{len(wrong)} cannot be tokens of this tokenizer ({shown(wrong)})"
            fix = "remove them: it does not read them as one token, or shows them as other text"
            self.findings.problem(self.config.where("extra_tokens"), what, fix)
        self._say(kept, len(unfit) + len(lost - named.keys()), list(cut))
        if unknown := unknown_to_converter(tokens, kept):
            self.findings.note(
                "llama.cpp's converter will not know the tokenizer, by how it reads a test text: "
                f"{len(unknown)} of the added tokens are in that ({shown(unknown)})"
            )
        return made, kept

    def _say(self, added: list[Token], left: int, cut: list[str]) -> None:
        note = self.findings.note
        if added:
            special = sum(token.special for token in added)
            names = shown(token.text for token in added)
            note(f"tokenizer: {len(added)} tokens are added, {special} of them special: {names}")
        elif self.config.tokenizer == UNION:
            note("tokenizer: union adds nothing: the base model's has every token")
        if left:
            note(
                f"tokenizer: {left} pieces of other tokenizers are left out: parts of characters, "
                "or what would cut tokens that were there"
            )
        if cut:
            note(f"tokenizer: {len(cut)} tokens are now read in parts ({shown(cut)})")

    def _with_template(self, written: dict[str, bytes], tokens: Tokens) -> dict[str, bytes]:
        """With the chat template of the first expert that has one, if the base model has none."""
        directory = self.base.model.directory
        if chat_template(directory):
            return written
        for donor in self.experts:
            if template := chat_template(donor.model.directory):
                self.findings.note(f"the chat template is {donor.name}'s: the base model has none")
                ends = [self._id_of(tokens, donor, number) for number in _ends(donor)]
                found = [number for number in ends if number is not None]
                return with_template(directory, written, template, found)
        return written

    def _id_of(self, tokens: Tokens, donor: Donor, number: int) -> int | None:
        theirs = self._tokens(donor)
        names = [token for token, its in theirs.ids.items() if its == number]
        return tokens.find(theirs, names[0]) if names else None

    def _places(self, tokens: Tokens, own: Tokens, owner: Donor, new: set[str]) -> Iterator[_Place]:
        """Where each row comes from; a token that the base model has is the base model's."""
        donors = [owner, *(donor for donor in self.experts if donor is not owner)]
        known = [(donor, theirs) for donor in donors if (theirs := self._maybe(donor))]
        spelled = {number: token for token, number in reversed(tokens.ordered)}
        reader, means = open_tokenizer(own), list[str]()
        for number in range(max(tokens.size, size_of(owner))):
            token = spelled.get(number)
            stays = token is None or (owner is self.base and token not in new)
            if stays and number < size_of(owner):
                yield owner, number
                continue
            text = None if token is None else tokens.text_of(token)
            places = (
                (donor, found)
                for donor, theirs in [(self.base, own), *known]
                if token is not None and (found := theirs.find(tokens, token)) is not None
            )
            place = next((at for at in places if at[1] < size_of(at[0])), None)
            if place is None:
                means.append(token or "")
            read = pieces(reader, own, text) if text and place is None else []
            yield place or (self.base, tuple(row for row in read if row < size_of(self.base)))
        if means:
            self.findings.note(
                f"vocabulary: {len(means)} tokens that no model has begin as the mean of their "
                f"pieces' rows ({shown(means)}): train the result on text that has them"
            )

    def _maybe(self, donor: Donor) -> Tokens | None:
        try:
            return self._tokens(donor)
        except _Unknown:
            return None

    def _with_rows(self, kept: Vocabulary, places: list[_Place]) -> Vocabulary:
        size, multiple = len(places), self.config.pad_vocabulary
        wanted = -(-size // multiple) * multiple
        if wanted > size:
            line = f"vocabulary: padded from {size} to {wanted} rows"
            self.findings.note(line)
        elif multiple > 1:
            self.findings.note(f"pad_vocabulary has no effect: {size} is a multiple of {multiple}")
        rows = tuple(_runs([*places, *[(self.base, ())] * (wanted - size)]))
        return replace(kept, rows=rows, config={**kept.config, "vocab_size": wanted})


def _sound(
    tokens: Tokens, wanted: dict[str, Token], optional: set[str]
) -> tuple[Tokens, list[Token]]:
    """The tokenizer with what can be added to it, and what that is.

    Left out is what is not read as one token and shown as its text, and of the `optional` also what
    cuts a token that was there.

    Raises:
        ValueError: nothing can be added to it.
    """
    kept = [token for text, token in wanted.items() if text not in tokens.ids]
    while True:
        made = with_added(tokens, kept)
        lost = set(unreadable(made, kept))
        cut = cut_by(tokens, made) if optional else {}
        lost |= optional.intersection(text for found in cut.values() for text in found)
        if not lost:
            return made, kept
        kept = [token for token in kept if token.text not in lost]


def _runs(places: Iterable[_Place]) -> Iterator[Rows | MeanRow]:
    """Rows that stand one below another in a donor as one stretch."""
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


def _special_ids(donor: Donor) -> dict[str, Any]:
    return {key: donor.model.config.get(key) for key in _SPECIAL_IDS}


def _ends(donor: Donor) -> list[int]:
    """The tokens that end what a donor generates."""
    said = read_object(donor.model.directory / GENERATION_FILE).get("eos_token_id")
    said = donor.model.config.get("eos_token_id") if said is None else said
    return [
        number for number in (said if isinstance(said, list) else [said]) if type(number) is int
    ]
