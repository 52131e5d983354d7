"""Each expert's prompts and calibration texts: read, checked, and encoded to token ids."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moemerge.checkpoint import Donor
from moemerge.config import MergeConfig, Picture
from moemerge.errors import Findings
from moemerge.text import PIECE_TOKENS, Encoder, Pictures, Prompt, documents_of


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


def check_prompts(config: MergeConfig, needed_by: str, findings: Findings) -> None:
    """Record experts without prompts, and experts with the same prompts."""
    for index, expert in enumerate(config.experts):
        if not expert.positive_prompts and not expert.calibration:
            findings.problem(
                config.where(f"experts[{index}]"),
                f"has no positive_prompts; {needed_by} needs them",
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
        both = tuple(sorted(positive, key=repr)), tuple(sorted(negative, key=repr))
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


def _pictures(config: MergeConfig, base: Donor, findings: Findings) -> Pictures | None:
    """The base's processor if a prompt has a picture; None, with a problem, if it has none."""
    found = [
        config.where(f"{at}.{key}[{number}]")
        for at, expert in config.every_expert
        for key in ("positive_prompts", "negative_prompts")
        for number, prompt in enumerate(getattr(expert, key))
        if isinstance(prompt, Picture)
    ]
    if not found:
        return None
    if "wrapper" not in base.model.config:
        what, fix = "has a picture, and the base model reads text alone", "name one that sees"
        findings.problem(found[0], what, fix)
        return None
    if importlib.util.find_spec("PIL") is None:
        what, fix = "has a picture: Pillow is not installed", "pip install 'moemerge[vision]'"
        findings.problem(found[0], what, fix)
        return None
    try:
        return Pictures(base.model.directory)
    except ValueError as error:
        fix = "add its processor_config.json and preprocessor_config.json"
        findings.problem(found[0], f"has a picture: {error}", fix)
        return None


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

    pictures = _pictures(config, base, findings)

    def read(text: str | Picture, where: str) -> Prompt | None:
        if not isinstance(text, Picture):
            return encoder.encode(text)
        try:
            file = (config.folder or Path()) / text.image
            return pictures.encode(file, text.text) if pictures else None
        except ValueError as error:
            findings.problem(where, str(error), "name the file of a picture")
            return None

    def encode(texts: tuple[str | Picture, ...], key: str) -> Iterator[Prompt]:
        for number, text in enumerate(texts):
            where = config.where(f"{key}[{number}]")
            prompt = read(text, where)
            if prompt is None:
                continue
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
        ids = (
            ([(p.ids, p.seen) for p in e.own], [(p.ids, p.seen) for p in e.negative])
            for e in encoded
        )
        _check_apart(config, ids, findings, apart)
    return encoded
