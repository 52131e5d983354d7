"""Prompts as the base model reads them: token ids, and which of them are the prompt's own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>")


@dataclass(frozen=True)
class Prompt:
    """A prompt's `ids`; those from `own` on are its own, those before are what models see first."""

    ids: tuple[int, ...]
    own: int


class Encoder:
    """The base model's tokenizer, read without running anything of the repository."""

    def __init__(self, directory: Path):
        """Open the tokenizer of a model directory.

        Raises:
            ValueError: there is none that can be read.
        """
        self.tokenizer = _open(directory)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.fallback = _first_seen(self.tokenizer, directory)

    def encode(self, text: str) -> Prompt:
        """Encode one prompt; special tokens written in it are parsed as such.

        Before it stands what the tokenizer's post-processor adds, else the token that the model was
        trained to see first (see `_first_seen`).
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        whole = self.tokenizer.encode(text, add_special_tokens=True).ids
        starts = range(len(whole) - len(ids) + 1)
        own = next((at for at in starts if whole[at : at + len(ids)] == ids), 0)
        prefix = whole[:own] or self.fallback
        return Prompt((*prefix, *ids), len(prefix))


def _first_seen(tokenizer: Tokenizer, directory: Path) -> list[int]:
    """The document separator or bos_token, whichever the model was trained to see first.

    A vocabulary lists the special tokens of pre-training before those that chat tuning added, so
    of the two it is the one with the lower id: SmolLM2-Instruct names `<|im_start|>` (1) as its
    bos_token, but each document of its training began with `<|endoftext|>` (0).
    """
    path = directory / "tokenizer_config.json"
    config: Any = {}
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"tokenizer_config.json is not JSON ({error})") from error
    bos = config.get("bos_token") if isinstance(config, dict) else None
    bos = bos.get("content") if isinstance(bos, dict) else bos
    candidates = [tokenizer.token_to_id(str(token)) for token in (bos, *_SEPARATORS) if token]
    known = [number for number in candidates if number is not None]
    return [min(known)] if known else []


def _open(directory: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    try:
        if path.is_file():
            return Tokenizer.from_file(str(path))
        if not (directory / "tokenizer.model").is_file():
            raise ValueError("there is no tokenizer.json")
        from transformers import AutoTokenizer

        slow = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        return Tokenizer.from_str(slow.backend_tokenizer.to_str())
    except ValueError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(f"its tokenizer cannot be read ({error})") from error
