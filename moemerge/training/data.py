"""Text to train on: files as passages of tokens, and which tokens are learnt."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moemerge.errors import Findings
from moemerge.text import Encoder, documents_of, rows_of

_FEW = 20
"""Of fewer documents than this, passages are held out instead."""

_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}

Conversation = tuple[dict[str, str], ...]
"""Turns, each with its `role` and `content`."""

Template = Callable[[Sequence[dict[str, str]], bool], str]
"""A chat template: turns as text, and with True, the beginning of the assistant's answer."""


@dataclass(frozen=True)
class Passage:
    """Token `ids`, whether the loss counts each (never the first), and `starts`: where the texts
    in the passage begin (the first at 0)."""

    ids: tuple[int, ...]
    counted: tuple[bool, ...]
    starts: tuple[int, ...] = (0,)


def read(files: Iterable[str | Path], findings: Findings) -> list[str | Conversation]:
    """The files' documents: texts, or the conversations of a jsonl's `messages`."""
    found: list[str | Conversation] = []
    for named in files:
        before = len(found)
        try:
            rows = rows_of(Path(named)) if Path(named).is_file() else []
            if rows and all(isinstance(row, dict) and _turns(row) for row in rows):
                found += map(_conversation, rows)
            else:
                found += documents_of(str(named), None)
        except ValueError as error:
            fix = "name a UTF-8 text or jsonl file, a directory, or a dataset on the Hub"
            findings.problem("--data", str(error), fix)
            continue
        if len(found) == before:
            findings.problem("--data", f"{named} holds no text", "name one that does")
    return found


def passages_of(
    document: str | Conversation, encoder: Encoder, length: int, template: Template | None
) -> list[Passage]:
    """A document as passages of at most `length` tokens; a longer document is cut.

    In a conversation only the assistant's turns count, and tokens beyond `length` are left out.

    Raises:
        ValueError: there is no chat template, or its turns cannot be told apart.
    """
    if not isinstance(document, str):
        made = _spoken(document, encoder, template)
        short = Passage(made.ids[:length], made.counted[:length])
        return [short] if any(short.counted) else []
    prompt = encoder.encode(document)
    first, own = prompt.ids[: prompt.own], prompt.ids[prompt.own :]
    step = max(1, length - len(first))
    pieces = [first + own[at : at + step] for at in range(0, len(own), step)]
    return [
        Passage(ids, (False,) * max(1, len(first)) + (True,) * (len(ids) - max(1, len(first))))
        for ids in pieces
        if len(ids) > max(1, len(first))
    ]


def divide(
    documents: Sequence[Sequence[Passage]], share: float, seed: int
) -> tuple[list[Passage], list[Passage]]:
    """The passages to train on, and the held-out ones: whole documents if there are enough."""
    units = list(documents)
    if len(units) < _FEW:
        units = [[passage] for document in units for passage in document]
    order = list(range(len(units)))
    random.Random(seed).shuffle(order)
    count = min(max(1, round(share * len(units))), len(units) - 1)
    held = [passage for at in sorted(order[:count]) for passage in units[at]]
    return [passage for at in sorted(order[count:]) for passage in units[at]], held


def packed(passages: Iterable[Passage], length: int) -> list[Passage]:
    """Passages packed into rows of at most `length` tokens; no passage attends to another."""
    rows: list[Passage] = []
    for one in passages:
        last = rows[-1] if rows else None
        if last and len(last.ids) + len(one.ids) <= length:
            starts = (*last.starts, *(len(last.ids) + at for at in one.starts))
            rows[-1] = Passage(last.ids + one.ids, last.counted + one.counted, starts)
        else:
            rows.append(one)
    return rows


def endless(count: int, seed: int) -> Iterator[int]:
    """Numbers below `count` without end; each round has every number once, in a new order."""
    draw = random.Random(seed)
    while True:
        order = list(range(count))
        draw.shuffle(order)
        yield from order


def _turns(row: dict[str, Any]) -> list[Any]:
    turns = row.get("messages", row.get("conversations"))
    return turns if isinstance(turns, list) else []


def _conversation(row: dict[str, Any]) -> Conversation:
    made = []
    for turn in _turns(row):
        turn = turn if isinstance(turn, dict) else {}
        role, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(text, str):
            raise ValueError("a turn of a conversation has no role or no content")
        made.append({"role": _ROLES.get(role, role), "content": text})
    return tuple(made)


def _spoken(turns: Conversation, encoder: Encoder, template: Template | None) -> Passage:
    """A conversation as a passage; only the text of answers counts.

    The template is applied to one turn more each time, and must only append to the text before.
    """
    if template is None:
        raise ValueError("it has conversations, for which the tokenizer has no chat template")
    spans, text = [], ""
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        begun, text = template(turns[:number], True), template(turns[: number + 1], False)
        if not text.startswith(begun):
            raise ValueError("the chat template does not tell the assistant's turns apart")
        spans.append((len(begun), len(text)))
    text = template(turns, False)
    encoded = encoder.tokenizer.encode(text, add_special_tokens=False)
    counted = [
        any(start >= low and stop <= high for low, high in spans) and start < stop
        for start, stop in encoded.offsets
    ]
    return Passage(tuple(encoded.ids), (False, *counted[1:]))
