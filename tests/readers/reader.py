"""What the readers share: the request they read, the response they write, greedy steps.

    python read_X.py MODEL_DIR... REQUEST.json RESPONSE.json [--work DIR]

The request is `{"prompts": ["text", ...], "new_tokens": 16, "logits": false}`, or has
`"token_ids": [[1, 2], ...]` in place of prompts; the reader's own tokenizer encodes a text. The
response is a list. For each model it holds what did not fit it (`missing`, `unexpected`,
`mismatched`), the ids of each greedy continuation (`generated`; an end-of-sequence token does not
end it), how many tokens each prompt had (`prompt_lengths`) and, where asked for and known, the file
of the prompts' logits (`logits_npy`: an npz of one float32 array (T, V) per prompt, `arr_0`,
`arr_1`, ...); or nothing but the `error` that stopped it.
"""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Request:
    """What to do with the model; each prompt is a text, or a list of token ids."""

    prompts: list[str] | list[list[int]]
    new_tokens: int
    logits: bool


@dataclass
class Response:
    """What came of it; `logits` go to a file of their own."""

    reader: str
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    generated: list[list[int]] = field(default_factory=list)
    prompt_lengths: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)


def main(read: Callable[[Path, Request, Path], Response]) -> None:
    """Run `read(model_dir, request, work_dir)` on the command line's files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("request", type=Path)
    parser.add_argument("response", type=Path)
    parser.add_argument("--work", type=Path, help="for large files (default: beside the response)")
    options = parser.parse_args()
    work: Path = options.work or options.response.parent
    work.mkdir(parents=True, exist_ok=True)

    request = json.loads(options.request.read_text(encoding="utf-8"))
    if ("prompts" in request) == ("token_ids" in request):
        parser.error(f"{options.request}: give either `prompts` or `token_ids`")
    prompts = request["prompts"] if "prompts" in request else request["token_ids"]
    asked = Request(prompts, request.get("new_tokens", 16), request.get("logits", False))
    found = [
        _one(read, model, asked, work.resolve() / f"{options.response.stem}-{number}")
        for number, model in enumerate(options.models)
    ]
    options.response.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _one(
    read: Callable[[Path, Request, Path], Response], model: Path, request: Request, work: Path
) -> dict[str, Any]:
    """The response for a model, or the error that stopped it."""
    work.mkdir()
    try:
        content = asdict(read(model, request, work))
    except (Exception, SystemExit):
        return {"error": traceback.format_exc()}
    content["logits_npy"] = None
    if arrays := content.pop("logits"):
        np.savez(work / "logits.npz", *arrays)
        content["logits_npy"] = str(work / "logits.npz")
    return content


def generate(
    response: Response,
    request: Request,
    encode: Callable[[str], list[int]],
    start: Callable[[], Callable[[list[int]], np.ndarray]],
) -> None:
    """Fill `response` by greedy steps.

    `start()` begins a sequence: it returns a function that appends token ids to the sequence and
    returns their logits (T, V).
    """
    for prompt in request.prompts:
        ids = encode(prompt) if isinstance(prompt, str) else prompt
        step = start()
        logits = step(ids)
        response.prompt_lengths.append(len(ids))
        if request.logits:
            response.logits.append(logits)
        generated: list[int] = []
        while len(generated) < request.new_tokens:
            if generated:
                logits = step(generated[-1:])
            generated.append(int(logits[-1].argmax()))
        response.generated.append(generated)
