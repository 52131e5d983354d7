"""Prompts as the base model reads them: token ids, and which of them are the prompt's own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moemerge.checkpoint import Donor
from moemerge.config import MergeConfig
from moemerge.errors import Findings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>")


@dataclass(frozen=True)
class Prompt:
    """A prompt's `ids`; those from `own` on are its own, those before are what models see first."""

    ids: tuple[int, ...]
    own: int


@dataclass(frozen=True)
class ExpertPrompts:
    """One expert's prompts, encoded."""

    positive: tuple[Prompt, ...]
    negative: tuple[Prompt, ...]


def check_prompts(config: MergeConfig, findings: Findings) -> None:
    """Record experts without prompts, and experts that no prompt tells apart."""
    for index, expert in enumerate(config.experts):
        if not expert.positive_prompts:
            findings.problem(
                config.where(f"experts[{index}]"),
                f"has no positive_prompts, which gate_mode: {config.gate_mode} needs",
                "add some, or use gate_mode: random and train the routers afterwards",
            )
    texts = ((expert.positive_prompts, expert.negative_prompts) for expert in config.experts)
    _check_apart(config, texts, findings)


def _check_apart(
    config: MergeConfig, experts: Iterable[tuple[Iterable[Any], Iterable[Any]]], findings: Findings
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
        elif both in seen:
            findings.problem(
                where,
                f"has, token for token, the same prompts as experts[{seen[both]}], so no router "
                "can choose",
                "give each expert its own, or use gate_mode: random",
            )
        seen.setdefault(both, index)


def encode_prompts(
    config: MergeConfig, base: Donor, findings: Findings
) -> tuple[ExpertPrompts, ...]:
    """Every expert's prompts as the base model reads them; record those that it cannot."""
    try:
        encoder = Encoder(base.model.directory)
    except ValueError as error:
        fix = "add its tokenizer.json, or use gate_mode: random"
        findings.problem(base.where, f"prompts cannot be read: {error}", fix)
        return ()
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
        )
        for index, expert in enumerate(config.experts)
    )
    if len(findings.problems) == refused:  # else some are left out here
        ids = (([p.ids for p in e.positive], [p.ids for p in e.negative]) for e in encoded)
        _check_apart(config, ids, findings)
    return encoded


class Encoder:
    """The base model's tokenizer, read without running anything of the repository."""

    def __init__(self, directory: Path):
        """Open the tokenizer of a model directory.

        Raises:
            ValueError: there is none that can be read.
        """
        self.tokenizer = _open(directory)
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


def _open(directory: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    try:
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
