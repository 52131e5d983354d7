"""Held-out passages of a demo domain's documents, which share next to nothing with training text.

`python scripts/demo_heldout.py` writes examples/heldout/other.jsonl, text of no domain.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from demo_corpus import documents
from smollm2 import model_dir
from transformers import AutoTokenizer, PreTrainedTokenizerBase

PASSAGE_TOKENS = (60, 180)
PASSAGES = 24
SHINGLE_WORDS = 8


def main() -> None:
    """Write the passages of `other`; those of the domains are written where they are trained."""
    train, heldout = documents("other", model_dir().parent / "demo-corpus")
    passages = choose(train, heldout, AutoTokenizer.from_pretrained(model_dir()), 0)
    write(Path(__file__).parent.parent / "examples/heldout/other.jsonl", passages)


def choose(
    train: dict[str, str], heldout: dict[str, str], tokenizer: PreTrainedTokenizerBase, seed: int
) -> list[dict[str, str]]:
    """Choose passages of whole paragraphs, spread over the held-out documents.

    One that shares more than a tenth of its 8-word sequences with training text, or with a passage
    chosen before it, is left out.
    """
    seen = {shingle for text in train.values() for shingle in _shingles(text)}
    draw = random.Random(seed)
    queues = []
    for name, text in heldout.items():
        passages = _cut(text, tokenizer)
        draw.shuffle(passages)
        queues.append([{"text": passage, "source": name} for passage in passages])
    draw.shuffle(queues)
    chosen: list[dict[str, str]] = []
    while any(queues):  # one from each document, then a second, ...
        for queue in filter(None, queues):
            passage = queue.pop()
            shingles = _shingles(passage["text"])
            if sum(shingle in seen for shingle in shingles) <= len(shingles) / 10:
                chosen.append(passage)
                seen |= shingles
    chosen = chosen[:PASSAGES]
    return sorted(chosen, key=lambda passage: (passage["source"], passage["text"]))


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return set(zip(*(words[start:] for start in range(SHINGLE_WORDS)), strict=False))


def _cut(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Cut a document between paragraphs into passages of PASSAGE_TOKENS; drop what does not fit."""
    low, high = PASSAGE_TOKENS
    passages: list[str] = []
    passage = ""
    for paragraph in text.strip().split("\n\n"):
        longer = f"{passage}\n\n{paragraph}" if passage else paragraph
        if len(tokenizer(longer).input_ids) <= high:
            passage = longer
            continue
        passages.append(passage)
        passage = paragraph
    passages.append(passage)
    return [text for text in passages if low <= len(tokenizer(text).input_ids) <= high]


def write(path: Path, passages: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(passage, ensure_ascii=False) + "\n" for passage in passages]
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
