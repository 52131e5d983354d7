"""A tokenizer's tokens: read from its tokenizer.json, compared, and added to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer


TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
ADDED_FILE = "added_tokens.json"
_FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")
_SHOWN = 3


@dataclass(frozen=True)
class Token:
    """A token to add: its text, and the flags that say how it is matched and shown."""

    text: str
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class Tokens:
    """The tokens of a tokenizer.json, whose content is `data`.

    `ids` are by the token's spelling in the file. `added` are the tokens outside the model's own
    pieces. `spelling` says how a piece stands for its text: with "bytes", each byte is a letter
    (Radford et al. 2019, GPT-2's encoder.py); with "sentencepiece", a space is U+2581 and a byte
    may be `<0x0A>` (Kudo & Richardson 2018, https://arxiv.org/abs/1808.06226); with "plain", a
    piece is its text.
    """

    data: dict[str, Any]
    ids: dict[str, int]
    added: dict[str, Token]
    spelling: str

    @property
    def size(self) -> int:
        """One more than the highest id."""
        return max(self.ids.values(), default=-1) + 1

    @cached_property
    def ordered(self) -> list[tuple[str, int]]:
        """Every token's spelling and id, by id."""
        return sorted(self.ids.items(), key=lambda item: (item[1], item[0]))

    def bytes_of(self, token: str) -> bytes:
        """A token's text in UTF-8; a piece may be a part of a character."""
        if token in self.added or self.spelling == "plain":
            return token.encode("utf-8", "surrogatepass")
        if self.spelling == "bytes":
            letters = _byte_letters()
            if all(letter in letters for letter in token):
                return bytes(letters[letter] for letter in token)
        elif self.is_byte(token):
            return bytes([int(token[3:5], 16)])
        else:
            token = token.replace("\u2581", " ")
        return token.encode("utf-8", "surrogatepass")

    def text_of(self, token: str) -> str | None:
        """A token's text; None if it is not a whole number of characters."""
        try:
            return self.bytes_of(token).decode()
        except UnicodeDecodeError:
            return None

    def find(self, other: Tokens, token: str) -> int | None:
        """This tokenizer's id for another tokenizer's token: by its spelling, otherwise by its
        text.

        If both tokenizers spell pieces alike, the same spelling is the same token.
        """
        added = token in self.added
        alike = added or self.spelling == other.spelling
        if alike and added == (token in other.added) and token in self.ids:
            return self.ids[token]
        return self._by_bytes.get(other.bytes_of(token))

    def has(self, text: str) -> bool:
        """Whether a token has this text."""
        return text in self.added or text.encode("utf-8", "surrogatepass") in self._by_bytes

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        """The first token with these bytes. A token that is a character comes before one that
        stands for its byte."""
        last = sorted(self.ids.items(), key=lambda item: (not self.is_byte(item[0]), -item[1]))
        return {self.bytes_of(token): number for token, number in last}

    def is_byte(self, token: str) -> bool:
        """Whether a piece, such as `<0x0A>`, stands for one byte of text that no piece covers."""
        digits = token[3:5] if len(token) == 6 and token[:3] == "<0x" and token[5] == ">" else ""
        bare = self.spelling == "sentencepiece" and token not in self.added
        return bare and len(digits) == 2 and all(d in "0123456789ABCDEFabcdef" for d in digits)


@dataclass(frozen=True)
class Comparison:
    """The differences between two tokenizers, by tokens' spelling in the files.

    `moved` tokens have another id. `more` tokens are only in the other, `fewer` only in the first.
    `marked` tokens have other flags.
    """

    alike: int = 0
    moved: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    fewer: tuple[str, ...] = ()
    marked: tuple[str, ...] = ()

    def __str__(self) -> str:
        kinds = (
            (self.moved, "{} other ids than in the base model"),
            (self.more, "{} no match in the base model's tokenizer"),
            (self.fewer, "of the base model's, {} no match here"),
            (self.marked, "{} other flags, such as special"),
        )
        said = [_counted(tokens, line) for tokens, line in kinds if tokens]
        return ", ".join([*said, f"{self.alike} are alike"])

    def __bool__(self) -> bool:
        return bool(self.moved or self.more or self.fewer or self.marked)


def read_tokens(directory: Path) -> Tokens:
    """The tokens of a model directory's tokenizer.json.

    Raises:
        ValueError: there is no such file, or the `tokenizers` library did not write it; says which.
    """
    return parse_tokens(read_content(directory))


def read_content(directory: Path) -> bytes:
    """The bytes of a model directory's tokenizer.json.

    Raises:
        ValueError: there is no such file, or it cannot be read.
    """
    path = directory / TOKENIZER_FILE
    if not path.is_file():
        raise ValueError(f"there is no {TOKENIZER_FILE}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error


@lru_cache(maxsize=2)
def parse_tokens(content: bytes) -> Tokens:
    """The tokens of a tokenizer.json.

    Raises:
        ValueError: the `tokenizers` library did not write it.
    """
    try:
        data = json.loads(content)
        vocabulary = data["model"]["vocab"]
        if isinstance(vocabulary, list):  # a Unigram model lists [token, score]
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        listed = data.get("added_tokens") or []
        ids = {**vocabulary, **{token["content"]: token["id"] for token in listed}}
        if not all(type(t) is str and type(n) is int and n >= 0 for t, n in ids.items()):
            raise ValueError("a token is no text, or its id no number")
        added = {token["content"]: _token(token) for token in listed}
        return Tokens(data, ids, added, _spelling(data))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"its {TOKENIZER_FILE} cannot be understood ({error})") from error


def compare_contents(ours: bytes, theirs: bytes) -> Comparison:
    """Compare another tokenizer.json with ours; equal content is not parsed.

    Raises:
        ValueError: the `tokenizers` library did not write one of them.
    """
    return Comparison() if ours == theirs else compare_tokens(*map(parse_tokens, (ours, theirs)))


def compare_tokens(ours: Tokens, theirs: Tokens) -> Comparison:
    """Compare another tokenizer with ours, token by token."""
    both = [token for token, _ in theirs.ordered if token in ours.ids]
    moved = {token for token in both if ours.ids[token] != theirs.ids[token]}
    marked = {token for token in both if ours.added.get(token) != theirs.added.get(token)}
    return Comparison(
        alike=len(both) - len(moved | marked),
        moved=tuple(token for token in both if token in moved),
        more=tuple(token for token, _ in theirs.ordered if token not in ours.ids),
        fewer=tuple(token for token, _ in ours.ordered if token not in theirs.ids),
        marked=tuple(token for token in both if token in marked),
    )


def missing(tokens: Tokens, other: Tokens) -> tuple[list[Token], set[bytes]]:
    """The tokens of `other` that `tokens` lacks, by id, and those of them that cannot be added.

    Added tokens keep their flags. A piece becomes a token that is not special and is matched as
    text. That is impossible if it is a part of a character, or if a piece of `tokens` is spelled
    like its text.
    """
    found: dict[str, Token] = {}
    unfit = set()
    for token, _ in other.ordered:
        if tokens.find(other, token) is not None:
            continue
        text = other.text_of(token)
        if not text or text in tokens.ids or other.is_byte(token):
            unfit.add(other.bytes_of(token))
        else:
            found.setdefault(text, other.added.get(token) or Token(text))
    return list(found.values()), unfit


def with_added(tokens: Tokens, more: Sequence[Token]) -> Tokens:
    """The tokenizer with tokens added at its end, numbered as the `tokenizers` library numbers
    them.

    Raises:
        ValueError: its ids have holes, which that library would fill.
    """
    if not more:
        return tokens
    vocabulary = tokens.data["model"]["vocab"]
    listed = tokens.data.get("added_tokens") or []
    first = max([len(vocabulary), *(token["id"] + 1 for token in listed)])
    if first < tokens.size:
        raise ValueError(f"its {len(tokens.ids)} tokens have ids up to {tokens.size - 1}")
    new = {token.text: first + at for at, token in enumerate(more)}
    entries = [
        {"id": new[token.text], "content": token.text, **{f: getattr(token, f) for f in _FLAGS}}
        for token in more
    ]
    data = {**tokens.data, "added_tokens": [*listed, *entries]}
    added = {**tokens.added, **{token.text: token for token in more}}
    return dataclasses.replace(tokens, data=data, ids={**tokens.ids, **new}, added=added)


def open_tokenizer(tokens: Tokens) -> Tokenizer:
    """The tokenizer, ready to run.

    Raises:
        ValueError: the `tokenizers` library refuses it.
    """
    from tokenizers import Tokenizer

    try:
        made = Tokenizer.from_str(json.dumps(tokens.data))
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(f"its tokenizer cannot be read ({error})") from error
    made.no_truncation()
    made.no_padding()
    return made


def pieces(tokenizer: Tokenizer, tokens: Tokens, text: str) -> list[int]:
    """The ids into which a tokenizer without the token `text` splits it, without a leading
    space."""
    read = tokenizer.encode(text, add_special_tokens=False)
    bare = tokens.spelling == "sentencepiece" and text[:1] != " " and read.tokens[:1] == ["\u2581"]
    return list(read.ids[1:] if bare and len(read.ids) > 1 else read.ids)


def unreadable(tokens: Tokens, only: Sequence[Token]) -> list[str]:
    """The added tokens of `only` that are not read as one token, or whose text is not shown.

    Some decoders remove the first space of every text.

    Raises:
        ValueError: the `tokenizers` library refuses the tokenizer.
    """
    tokenizer, texts = open_tokenizer(tokens), [token.text for token in only]
    read = tokenizer.encode_batch(texts, add_special_tokens=False)

    def holds(text: str, ids: list[int]) -> bool:
        back = tokenizer.decode(ids, skip_special_tokens=False)
        return ids == [tokens.ids[text]] and back in (text, text.removeprefix(" "))

    return [text for text, found in zip(texts, read, strict=True) if not holds(text, found.ids)]


def cut_by(before: Tokens, after: Tokens) -> dict[str, list[str]]:
    """The texts that are one token in `before` and several in `after`, which has more tokens: each
    with the added token that cuts it.

    Raises:
        ValueError: the `tokenizers` library refuses one of them.
    """
    texts = {text: n for token, n in reversed(before.ordered) if (text := before.text_of(token))}
    listed = list(texts)
    read = open_tokenizer(after).encode_batch(listed, add_special_tokens=False)
    changed = {t: f.ids for t, f in zip(listed, read, strict=True) if f.ids != [texts[t]]}
    was = open_tokenizer(before).encode_batch(list(changed), add_special_tokens=False)
    new = {number: token for token, number in after.ids.items() if token not in before.ids}
    return {
        text: [new[number] for number in ids if number in new]
        for (text, ids), found in zip(changed.items(), was, strict=True)
        if found.ids == [texts[text]]
    }


def shown(tokens: Iterable[str]) -> str:
    """The first few tokens for a person."""
    listed = list(tokens)
    return ", ".join(map(repr, listed[:_SHOWN])) + (", ..." if len(listed) > _SHOWN else "")


def _counted(tokens: Sequence[str], line: str) -> str:
    count = f"{len(tokens)} token{'s have' if len(tokens) > 1 else ' has'}"
    return f"{line.format(count)} ({shown(tokens)})"


def _token(entry: dict[str, Any]) -> Token:
    return Token(entry["content"], **{flag: bool(entry.get(flag)) for flag in _FLAGS})


def _spelling(data: dict[str, Any]) -> str:
    parts = [data.get(part) for part in ("decoder", "pre_tokenizer", "normalizer")]
    kinds = {kind for part in parts for kind in _kinds(part)}
    if "ByteLevel" in kinds:
        return "bytes"
    return "sentencepiece" if {"Metaspace", "\u2581"} & kinds else "plain"


def _kinds(part: Any) -> Iterator[str]:
    """The types of a pipeline's steps, and the U+2581 that a step replaces or writes."""
    if isinstance(part, dict):
        yield str(part.get("type"))
        yield from ("\u2581" for value in part.values() if value == "\u2581")
        part = list(part.values())
    for inner in part if isinstance(part, list) else ():
        yield from _kinds(inner)


@lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """The letter for each byte: the byte itself if it is visible, otherwise one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {chr(byte): byte for byte in visible}
    return letters | {chr(0x100 + at): byte for at, byte in enumerate(hidden)}
