"""A tokenizer that encodes prompts, and pieces of documents."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moemerge.errors import Findings
from moemerge.text.vocabulary import Vocabulary
from moemerge.tokenizer import TOKENIZER_FILE

if TYPE_CHECKING:
    from tokenizers import Tokenizer


CALIBRATION_TOKENS = 1 << 14
"""How many tokens of an expert's calibration texts are read."""

PIECE_TOKENS = 256
"""The longest piece, in tokens, that a model reads at once."""

_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>")


@dataclass(frozen=True)
class Seen:
    """What a model that sees gets beside token ids, such as `pixel_values`, by its own names."""

    given: Mapping[str, Any] = field(compare=False)
    digest: str


@dataclass(frozen=True)
class Prompt:
    """A prompt's token ids. The ids from `own` on are the prompt's own; those before it are what
    the model was trained to see first. A prompt with a picture has what was `seen` in it."""

    ids: tuple[int, ...]
    own: int
    seen: Seen | None = None


def open_encoder(vocabulary: Vocabulary, findings: Findings) -> Encoder | None:
    """The mixture's tokenizer; None, with a problem recorded, if it cannot be read."""
    try:
        return Encoder(vocabulary.directory, vocabulary.written)
    except ValueError as error:
        fix = "add its tokenizer.json, or use gate_mode: random"
        findings.problem(vocabulary.base.where, f"prompts cannot be read: {error}", fix)
        return None


class Encoder:
    """A tokenizer, read without running any code of its repository."""

    def __init__(self, directory: Path, written: Mapping[str, bytes] | None = None):
        """Open the tokenizer of a model directory; files that are in `written` count instead.

        Raises:
            ValueError: there is none that can be read.
        """
        self.tokenizer = _open(directory, written or {})
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.fallback = _first_seen(self.tokenizer, directory)

    def encode(self, text: str) -> Prompt:
        """Encode one prompt; special tokens in its text are parsed as such.

        First come the tokens that the tokenizer's post-processor adds, otherwise the token that the
        model was trained to see first (see `_first_seen`), unless the text begins with that token.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        whole = self.tokenizer.encode(text, add_special_tokens=True).ids
        starts = range(len(whole) - len(ids) + 1)
        own = next((at for at in starts if whole[at : at + len(ids)] == ids), 0)
        prefix = whole[:own] or self.fallback
        written = ids[: len(prefix)] == prefix
        return Prompt(tuple(ids if written else prefix + ids), len(prefix))

    def start(self) -> Prompt:
        """The tokens that come before every text; its `ids` may be empty."""
        some = self.encode("a")
        return Prompt(some.ids[: some.own], some.own)

    def special(self) -> list[int]:
        """The ids of the special tokens."""
        added = self.tokenizer.get_added_tokens_decoder()
        return sorted(number for number, token in added.items() if token.special)

    def spelled(self, ids: Iterable[int]) -> list[str]:
        """The text of each token; a character of several tokens is given to the last of them."""
        texts, whole, before = [], list(ids), ""
        for end in range(1, len(whole) + 1):
            now = self.tokenizer.decode(whole[:end], skip_special_tokens=False)
            if now.endswith("\ufffd") and end < len(whole):
                texts.append("")
                continue
            texts.append(now[len(before) :])
            before = now
        return texts

    def pieces(
        self, documents: Iterable[str], longest: int, most: int | None = None
    ) -> tuple[Prompt, ...]:
        """The first `most` tokens of some documents, in pieces of at most `longest` tokens.

        Without `most`, it is as many tokens as count of an expert's calibration texts.
        """
        pieces: list[Prompt] = []
        left = CALIBRATION_TOKENS if most is None else most
        for document in documents:
            whole = self.encode(document)
            first, own = whole.ids[: whole.own], whole.ids[whole.own :][:left]
            step = max(1, longest - len(first))
            for at in range(0, len(own), step):
                pieces.append(Prompt(first + own[at : at + step], len(first)))
            left -= len(own)
            if not left:
                break
        return tuple(pieces)


def _first_seen(tokenizer: Tokenizer, directory: Path) -> list[int]:
    """The document separator or bos_token, whichever the model was trained to see first.

    A vocabulary lists the special tokens of pre-training before those that chat tuning added. So it
    is the one with the lower id: SmolLM2-Instruct names `<|im_start|>` (1) as its bos_token, but
    each document of its training began with `<|endoftext|>` (0).
    """
    path = directory / "tokenizer_config.json"
    config: Any = {}
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tokenizer_config.json is not JSON ({error})") from error
    bos = config.get("bos_token") if isinstance(config, dict) else None
    bos = bos.get("content") if isinstance(bos, dict) else bos
    candidates = [tokenizer.token_to_id(str(token)) for token in (bos, *_SEPARATORS) if token]
    known = [number for number in candidates if number is not None]
    return [min(known)] if known else []


def _open(directory: Path, written: Mapping[str, bytes]) -> Tokenizer:
    from tokenizers import Tokenizer

    path = directory / TOKENIZER_FILE
    try:
        if path.name in written:
            return Tokenizer.from_str(written[path.name].decode())
        if path.is_file():
            return Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(f"its tokenizer cannot be read ({error})") from error
    if (directory / "tokenizer.model").is_file():
        raise ValueError(
            "there is no tokenizer.json, only a tokenizer.model (save it once with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...), with sentencepiece installed)"
        )
    raise ValueError("there is no tokenizer.json")
