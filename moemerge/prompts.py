"""Prompts as the base model reads them: token ids, and which of them are the prompt's own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moemerge.checkpoint import Donor
from moemerge.config import MergeConfig
from moemerge.errors import Findings
from moemerge.tokens import TOKENIZER_FILE
from moemerge.vocabulary import Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CALIBRATION_TOKENS = 1 << 14
"""What is read of an expert's calibration texts."""

PIECE_TOKENS = 256
"""The longest piece of them that a model reads at once."""

_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>")


@dataclass(frozen=True)
class Prompt:
    """A prompt's `ids`; those from `own` on are its own, those before are what models see first."""

    ids: tuple[int, ...]
    own: int


@dataclass(frozen=True)
class ExpertPrompts:
    """One expert's prompts, encoded; `calibration` are pieces of its documents."""

    positive: tuple[Prompt, ...] = ()
    negative: tuple[Prompt, ...] = ()
    calibration: tuple[Prompt, ...] = ()

    @property
    def own(self) -> tuple[Prompt, ...]:
        """All that should find the expert."""
        return self.positive + self.calibration


def check_prompts(config: MergeConfig, findings: Findings) -> None:
    """Record experts without prompts, and experts that no prompt tells apart."""
    for index, expert in enumerate(config.experts):
        if not expert.positive_prompts and not expert.calibration:
            findings.problem(
                config.where(f"experts[{index}]"),
                f"has no positive_prompts, which gate_mode: {config.mode} needs",
                "add some, or a calibration text; gate_mode: self needs none, and gate_mode: "
                "random leaves the routers to training",
            )
    texts = (
        ((*expert.positive_prompts, expert.calibration or ""), expert.negative_prompts)
        for expert in config.experts
        if expert.positive_prompts or expert.calibration
    )
    _check_apart(config, texts, findings)


def _check_apart(
    config: MergeConfig,
    experts: Iterable[tuple[Iterable[Any], Iterable[Any]]],
    findings: Findings,
    apart: bool = True,
) -> None:
    """Record experts whose positive and negative prompts, in any order, are another's or equal.

    It runs over the texts, for a base model without a tokenizer, and over their tokens.
    """
    seen: dict[tuple[tuple[Any, ...], tuple[Any, ...]], int] = {}
    for index, (positive, negative) in enumerate(experts):
        where = config.where(f"experts[{index}]")
        both = tuple(sorted(positive)), tuple(sorted(negative))
        if not both[0]:
            continue  # said already
        if both[0] == both[1]:
            what = "its positive and negative prompts are the same, token for token"
            findings.problem(where, what, "change one of them")
        elif both in seen and apart:
            findings.problem(
                where,
                f"has, token for token, the same prompts as experts[{seen[both]}], so no router "
                "can choose",
                "give each expert its own, or use gate_mode: random",
            )
        seen.setdefault(both, index)


def open_encoder(vocabulary: Vocabulary, findings: Findings) -> Encoder | None:
    """The mixture's tokenizer; None, with a problem recorded, where it cannot be read."""
    try:
        return Encoder(vocabulary.directory, vocabulary.written)
    except ValueError as error:
        fix = "add its tokenizer.json, or use gate_mode: random"
        findings.problem(vocabulary.base.where, f"prompts cannot be read: {error}", fix)
        return None


def encode_prompts(
    config: MergeConfig,
    encoder: Encoder,
    base: Donor,
    documents: Sequence[Sequence[str]],
    findings: Findings,
    apart: bool = True,
) -> tuple[ExpertPrompts, ...]:
    """Every expert's prompts as the base model reads them; record those that it cannot.

    `documents` are each expert's calibration texts; of these, the first `CALIBRATION_TOKENS` count.
    With `apart`, no two experts may have the same prompts.
    """
    limits = base.model.config.get("max_position_embeddings"), base.model.config.get("vocab_size")

    def encode(texts: tuple[str, ...], key: str) -> Iterator[Prompt]:
        for number, text in enumerate(texts):
            prompt, where = encoder.encode(text), config.where(f"{key}[{number}]")
            longest, vocabulary = (limit if isinstance(limit, int) else 2**63 for limit in limits)
            if len(prompt.ids) == prompt.own:
                findings.problem(where, "has no tokens", "write another prompt")
            elif len(prompt.ids) > longest:
                what = f"is {len(prompt.ids)} tokens long, the base model takes {longest}"
                findings.problem(where, what, "shorten it")
            elif max(prompt.ids) >= vocabulary:
                what = f"has token {max(prompt.ids)}, the base model embeds {vocabulary}"
                findings.problem(where, what, "use the tokenizer that the model came with")
            else:
                yield prompt

    refused = len(findings.problems)
    encoded = tuple(
        ExpertPrompts(
            tuple(encode(expert.positive_prompts, f"experts[{index}].positive_prompts")),
            tuple(encode(expert.negative_prompts, f"experts[{index}].negative_prompts")),
            encoder.pieces(documents[index], min(PIECE_TOKENS, limits[0] or PIECE_TOKENS)),
        )
        for index, expert in enumerate(config.experts)
    )
    if len(findings.problems) == refused:  # else some are left out here
        ids = (([p.ids for p in e.own], [p.ids for p in e.negative]) for e in encoded)
        _check_apart(config, ids, findings, apart)
    return encoded


class Encoder:
    """A tokenizer, read without running anything of the repository."""

    def __init__(self, directory: Path, written: Mapping[str, bytes] | None = None):
        """Open the tokenizer of a model directory; what is `written` of it counts instead.

        Raises:
            ValueError: there is none that can be read.
        """
        self.tokenizer = _open(directory, written or {})
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.fallback = _first_seen(self.tokenizer, directory)

    def encode(self, text: str) -> Prompt:
        """Encode one prompt; special tokens written in it are parsed as such.

        Before it stands what the tokenizer's post-processor adds, else the token that the model was
        trained to see first (see `_first_seen`), unless the text itself begins with that.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        whole = self.tokenizer.encode(text, add_special_tokens=True).ids
        starts = range(len(whole) - len(ids) + 1)
        own = next((at for at in starts if whole[at : at + len(ids)] == ids), 0)
        prefix = whole[:own] or self.fallback
        written = ids[: len(prefix)] == prefix
        return Prompt(tuple(ids if written else prefix + ids), len(prefix))

    def start(self) -> Prompt:
        """What stands before every text, alone; its `ids` may be empty."""
        some = self.encode("a")
        return Prompt(some.ids[: some.own], some.own)

    def special(self) -> list[int]:
        """The ids of the special tokens."""
        added = self.tokenizer.get_added_tokens_decoder()
        return sorted(number for number, token in added.items() if token.special)

    def spelled(self, ids: Iterable[int]) -> list[str]:
        """Each token as text; of a character that several make up, the last has it all."""
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
        """The first `most` tokens of some documents in pieces of at most `longest`.

        Without `most` those that count of an expert's calibration texts.

        Tokens beyond the base model's vocabulary are the tokenizer's error and found with prompts.
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

    A vocabulary lists the special tokens of pre-training before those that chat tuning added, so
    of the two it is the one with the lower id: SmolLM2-Instruct names `<|im_start|>` (1) as its
    bos_token, but each document of its training began with `<|endoftext|>` (0).
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
