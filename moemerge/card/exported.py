"""The card of a directory as the card of the GGUF file that it was exported to."""

from __future__ import annotations

import re

from moemerge.card import card
from moemerge.card.running import of_file
from moemerge.card.text import size_of
from moemerge.output import PICTURE_FILE
from moemerge.plan import Plan

_RUNNING = "## Running it\n\n"
_AFTER = re.compile(r"\n\n(?:## |<!-- moemerge:)")
_SIZE = re.compile(r"^\| Size \| .* \|$", re.MULTILINE)
_PICTURE = re.compile(rf"!\[[^\n]*\]\({re.escape(PICTURE_FILE)}\)\n*")


def card_of_file(content: bytes, plan: Plan, pictured: bool) -> bytes | None:
    """The card of the file with this plan; None if the directory's was edited, or is no card.

    Without `pictured`, the picture of the routing is left out.
    """

    def change(text: str) -> str:
        keys = card.head_of(text)
        keys |= {"library_name": card.GGUF_TAGS[0], "tags": [*card.GGUF_TAGS, *keys["tags"]]}
        text = card.with_head(text, keys)
        before, found, rest = text.rpartition(_RUNNING)
        end = _AFTER.search(rest)
        lines = [*of_file(plan), "It was exported from a directory, whose numbers stand here."]
        told = "\n\n".join(lines)
        text = before + found + told + rest[end.start() :] if found and end else text
        text = _SIZE.sub(lambda _: f"| Size | {size_of(plan)} |", text, count=1)
        return text if pictured else _PICTURE.sub("", text)

    return card.changed(content, change)
