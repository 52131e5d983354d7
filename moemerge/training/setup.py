"""The start of a training: the mixture opened, the text as passages, and all problems found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moemerge.errors import Findings, InputError
from moemerge.gates import check_device_is_here
from moemerge.mixture import Moe, check_memory, open_moe
from moemerge.options import RunOptions
from moemerge.text import Encoder
from moemerge.training.data import Conversation, Passage, Template, passages_of, read
from moemerge.training.settings import Tuning

_USUAL_LENGTH = 256


def begin(
    out: str | Path,
    tuning: Tuning,
    options: RunOptions,
    findings: Findings,
    template_of: Callable[[Path], Template | None] | None,
) -> tuple[Moe | None, list[list[Passage]], int]:
    """Open the mixture `out`; return it, each document's passages, and the length of a passage.

    Problems are recorded. Conversations go through the chat template in `template_of`; without it
    they are read as plain text.
    """
    moe = None
    try:
        moe = open_moe(out, options.cache_dir, findings)
    except InputError as error:
        findings.problems += error.problems
    documents = read(tuning.data, findings)
    check_device_is_here(options, findings)
    if moe is None:
        return None, [], 0
    check_memory(moe, options, findings)
    length = _length(tuning, moe, findings)
    try:
        encoder = Encoder(moe.checkpoint.directory)
    except ValueError as error:
        findings.problem(moe.text, str(error), "copy the base's tokenizer")
        return moe, [], length
    template = None
    try:
        if template_of is None:
            documents = [one if isinstance(one, str) else _plain(one) for one in documents]
        elif any(not isinstance(one, str) for one in documents):
            template = template_of(moe.checkpoint.directory)
        made = [passages_of(one, encoder, length, template) for one in documents]
    except Exception as error:  # a template may raise anything
        findings.problem("--data", str(error), "repair the data, or the tokenizer's template")
        return moe, [], length
    if documents:
        _check(made, moe, findings)
    return moe, made, length


def _length(tuning: Tuning, moe: Moe, findings: Findings) -> int:
    """The length of a passage, which must fit into the model's context."""
    context = int(moe.config.get("max_position_embeddings") or 1 << 62)
    if tuning.length is not None and tuning.length > context:
        what = f"is {tuning.length}, the model reads {context} tokens at once"
        findings.problem("--length", what, f"write at most {context}")
    return tuning.length or min(_USUAL_LENGTH, context)


def _check(made: list[list[Passage]], moe: Moe, findings: Findings) -> None:
    """Record text that is too short to hold some out, or has tokens beyond the vocabulary."""
    flat = [passage for document in made for passage in document]
    if len(flat) < 2:
        findings.problem("--data", "is one passage: none could be held out", "name more text")
        return
    last, known = max(max(one.ids) for one in flat), int(moe.config["vocab_size"])
    if last >= known:
        what = f"has token {last}, the model embeds {known}"
        findings.problem("--data", what, "use the tokenizer that the model came with")


def _plain(turns: Conversation) -> str:
    return "\n".join(turn["content"] for turn in turns)
