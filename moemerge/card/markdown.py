"""Pieces of markdown: tables, links to sources, and other people's text without markup."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from moemerge.checkpoint import Checkpoint, Donor, Reference
from moemerge.errors import one_line

HUB = "https://huggingface.co"


def table(titles: Sequence[str], rows: Any) -> str:
    """A table in markdown; each row is the texts of its cells."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(text: str, most: int = 60) -> str:
    """Text on one short line or in a table's cell, with all markup and links escaped."""
    text = one_line(" ".join(text.split()))
    short = text if len(text) <= most else text[: most - 3] + "..."
    return re.sub(r"([\\`|<\[*~]|(?<=:)/(?=/)|(?<=www)\.)", r"\\\1", short)


def source(donor: Donor) -> str:
    """A donor's model and adapter by name; see `linked`."""
    return " + ".join(linked(one.reference, one.commit) for one in checkpoints(donor))


def checkpoints(donor: Donor) -> list[Checkpoint]:
    """A donor's model, and the adapter on top if there is one."""
    return [donor.model, *([donor.adapter.checkpoint] if donor.adapter else [])]


def linked(reference: Reference, commit: str | None) -> str:
    """A source by name, with a link to its commit if it is on the Hub."""
    if reference.directory:
        return shown(reference.short)
    return f"[{shown(reference.text, 200)}]({HUB}/{reference.repo}/tree/{commit})"
