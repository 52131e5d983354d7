"""A card's slots: text between two named comments, by which later commands find it."""

from __future__ import annotations

import re
from collections.abc import Iterable

ROUTING = "routing"
"""The section on how texts are routed, or on how the routers were trained afterwards."""

EVALUATION = "evaluation"
"""The section with an evaluation's results; empty before there are any."""

NOT_EVALUATED = "not-evaluated"
"""The words of the limits that are true until the mixture is evaluated."""

UNEVALUATED = " or evaluated"
"""These words, which stand between `trained` and `as a whole`."""

ROUTERS_LIMIT = "routers-limit"
"""The limits of the routers, which are true until the routers are trained."""


class NoSlot(LookupError):
    """The text has no slot of that name: moemerge did not write the text, or an older one did."""


def slot(name: str, content: str = "") -> str:
    """The content with the two comments around."""
    return f"<!-- moemerge:{name} -->{content}<!-- /moemerge:{name} -->"


def filled(text: str, name: str, content: str) -> str:
    """The text with this content in the slot.

    Raises:
        NoSlot: there is no such slot.
    """
    before, _, after = _around(text, name)
    return f"{before}{slot(name, content)}{after}"


def content_of(text: str, name: str) -> str:
    """The content of the slot.

    Raises:
        NoSlot: there is no such slot.
    """
    return _around(text, name)[1]


def block(paragraphs: Iterable[str]) -> str:
    """Paragraphs as the content of a slot that stands alone; empty if there are none."""
    text = "\n\n".join(paragraphs)
    return f"\n\n{text}\n\n" if text else ""


def without_slots(text: str) -> str:
    """A person's text for the top of a card, without comments that look like slots."""
    return re.sub(r"<!-- /?moemerge:[\w-]+ -->", "", text)


def _around(text: str, name: str) -> tuple[str, str, str]:
    """The text before the first slot of that name, its content, and the text after it.

    A comment after a backslash is not a slot: `markdown.shown` made it text.
    """
    found = re.search(
        rf"(?<!\\)<!-- moemerge:{name} -->(.*?)(?<!\\)<!-- /moemerge:{name} -->", text, re.DOTALL
    )
    if not found:
        raise NoSlot(name)
    return text[: found.start()], found[1], text[found.end() :]
