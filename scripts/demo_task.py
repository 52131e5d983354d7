"""A multiple-choice task of the demo domains, for lm-eval: which continuation is the true one?

    python scripts/demo_task.py

Each held-out passage is cut in the middle; the wrong choices are what comes at that place in other
passages of its domain. Written to examples/tasks, beside the task's file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DOMAINS = ("c", "french", "legal", "sql")
CHOICES = 4
MOST_CHARACTERS = 100
"""Of a choice."""


def documents(domain: str, passages: list[str]) -> Iterator[dict[str, Any]]:
    """A question of each passage: `context`, `choices`, and the `answer`'s place among them."""
    halves = [_halves(passage) for passage in passages]
    for number, (context, true) in enumerate(halves):
        draw = random.Random(f"{domain} {number}")
        others = sorted({half for _, half in halves} - {true})
        choices = [*draw.sample(others, CHOICES - 1), true]
        draw.shuffle(choices)
        yield {
            "domain": domain,
            "context": context,
            "choices": choices,
            "answer": choices.index(true),
        }


def _halves(passage: str) -> tuple[str, str]:
    """A passage up to the white space next to its middle, and what follows, cut between words."""
    blanks = [at for at, character in enumerate(passage) if character.isspace()]
    cut = min(blanks, key=lambda at: abs(at - len(passage) // 2))
    rest = passage[cut:]
    if len(rest) > MOST_CHARACTERS:
        rest = rest[:MOST_CHARACTERS].rpartition(" ")[0]
    return passage[:cut].rstrip(), rest.rstrip()


def main() -> None:
    """Write the task's documents."""
    with (EXAMPLES / "tasks/demo_domains.jsonl").open("w", encoding="utf-8") as file:
        for domain in DOMAINS:
            lines = (EXAMPLES / f"heldout/{domain}.jsonl").read_text(encoding="utf-8").splitlines()
            for document in documents(domain, [json.loads(line)["text"] for line in lines]):
                file.write(json.dumps(document, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
