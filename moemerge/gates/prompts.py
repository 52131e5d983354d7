"""Each expert's prompts and calibration texts: read, checked, and encoded to token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moemerge.checkpoint import Donor
from moemerge.config import MergeConfig
from moemerge.errors import Findings
from moemerge.text import PIECE_TOKENS, Encoder, Prompt, documents_of


def read_documents(config: MergeConfig, findings: Findings) -> list[list[str]]:
    """The calibration documents of each expert; record a problem for each that cannot be read."""
    found: list[list[str]] = []
    for index, expert in enumerate(config.experts):
        found.append([])
        if not expert.calibration:
            continue
        where = config.where(f"experts[{index}].calibration")
        try:
            found[-1] = documents_of(expert.calibration, config.folder)
        except ValueError as error:
            fix = "name a UTF-8 text or jsonl file, a directory, or a dataset on the Hub"
            findings.problem(where, str(error), fix)
            continue
        if not found[-1]:
            findings.problem(where, "holds no text", "name one that does")
    return found


@dataclass(frozen=True)
class ExpertPrompts:
    """The encoded prompts of one expert; `calibration` are pieces of its documents."""

    positive: tuple[Prompt, ...] = ()
    negative: tuple[Prompt, ...] = ()
    calibration: tuple[Prompt, ...] = ()

    @property
    def own(self) -> tuple[Prompt, ...]:
        """All texts whose tokens should go to the expert."""
        return self.positive + self.calibration


def check_prompts(config: MergeConfig, findings: Findings) -> None:
    """Record experts without prompts, and experts with the same prompts."""
    for index, expert in enumerate(config.experts):
        if not expert.positive_prompts and not expert.calibration:
            findings.problem(
                config.where(f"experts[{index}]"),
                f"has no positive_prompts; gate_mode: {config.mode} needs them",
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
    """Record experts with the same prompts as another expert, or as their own negative prompts.

    The order of prompts does not matter. This is called with texts, because a base model may have
    no tokenizer, and again with token ids.
    """
    seen: dict[tuple[tuple[Any, ...], tuple[Any, ...]], int] = {}
    for index, (positive, negative) in enumerate(experts):
        where = config.where(f"experts[{index}]")
        both = tuple(sorted(positive)), tuple(sorted(negative))
        if not both[0]:
            continue  # this problem is recorded already
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


def encode_prompts(
    config: MergeConfig,
    encoder: Encoder,
    base: Donor,
    documents: Sequence[Sequence[str]],
    findings: Findings,
    apart: bool = True,
) -> tuple[ExpertPrompts, ...]:
    """The encoded prompts of each expert; record prompts that the base model cannot read.

    `documents` are each expert's calibration texts. With `apart`, no two experts may have the same
    prompts.
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
    if len(findings.problems) == refused:  # otherwise prompts with problems are left out here
        ids = (([p.ids for p in e.own], [p.ids for p in e.negative]) for e in encoded)
        _check_apart(config, ids, findings, apart)
    return encoded
