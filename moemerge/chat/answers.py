"""What a conversation is made of: what is asked for, pieces of an answer, and who spoke them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

Turns = list[dict[str, str]]
"""A conversation: each turn's `role` and `content`."""


@dataclass(frozen=True)
class Asked:
    """How to answer: at most `tokens` tokens, drawn at that `temperature` from the `top_k`
    likeliest (0: from all). At temperature 0, the likeliest is taken. `layer` is the one whose
    experts are shown, or None for the mean of all."""

    tokens: int = 256
    temperature: float = 0.7
    top_k: int = 40
    seed: int = 0
    layer: int | None = None


@dataclass(frozen=True)
class Piece:
    """A piece of an answer, and the index of the expert that came first for it; None if that is
    not known."""

    text: str
    expert: int | None = None


class Answers(Protocol):
    """A model that answers. `experts` are its experts' names, empty if it does not tell which one
    spoke."""

    experts: Sequence[str]

    def answer(self, turns: Turns, asked: Asked) -> Iterator[Piece]:
        """The pieces of the answer to the last turn, as they are made."""


def spoken(pieces: Iterable[Piece], experts: Sequence[str]) -> str:
    """Who spoke how much, as a line; empty if it is not known."""
    counts = Counter(piece.expert for piece in pieces if piece.expert is not None)
    total = sum(counts.values())
    return ", ".join(
        f"{experts[number]} {count / total:.0%}" for number, count in counts.most_common()
    )
