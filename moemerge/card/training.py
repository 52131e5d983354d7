"""Trained routers in a card: a section in place of the one on the earlier routers."""

from __future__ import annotations

from typing import Any

from moemerge.card.evaluation import without_evaluation
from moemerge.card.slots import ROUTERS_LIMIT, ROUTING, block, filled


def with_training(text: str, tuned: dict[str, Any]) -> str:
    """A card's text with a section on the training; `tuned` is the manifest's record of it.

    Raises:
        NoSlot: the card has no place for it.
    """
    losses = dict(tuned["curve"])
    section = (
        "## Trained routers",
        f"Its routers were trained after the merge, all else frozen: {tuned['steps']} steps of "
        f"{tuned['batch']} passages of at most {tuned['length']} tokens, chosen by held-out loss "
        f"({losses[0]:.4f} before, {losses[tuned['steps']]:.4f} after, nats a token on "
        f"{tuned['held_out']} passages of the same data).",
    )
    text = filled(without_evaluation(text), ROUTERS_LIMIT, "")
    return filled(text, ROUTING, block(section))
