"""The small files of a tokenizer to which tokens were added, as every reader needs them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moemerge.tokens import ADDED_FILE, CONFIG_FILE, TOKENIZER_FILE, Token, Tokens

GENERATION_FILE = "generation_config.json"
_MAP_FILE = "special_tokens_map.json"
_CHECKED = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ "
    "(multiple emojis concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 "
    "3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= "
    "нещо на Български ''''''```````\"\"\"\"......"
    "!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)  # fmt: skip
"""What llama.cpp's converter (`CHK_TXT` in convert_hf_to_gguf_update.py) knows a byte-level BPE
tokenizer by: it must read this as the tokenizer did that llama.cpp was taught."""

_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")


def with_added_tokens(directory: Path, tokens: Tokens, more: Sequence[Token]) -> dict[str, bytes]:
    """The files of `directory` that must tell of the tokens `more`, which `tokens` has at its end.

    transformers 5 and mlx-lm read tokenizer.json; transformers 4 also what tokenizer_config.json
    says of added tokens, and so does llama.cpp's converter where there is a tokenizer.model, which
    knows none of them.

    Raises:
        ValueError: one of them is no JSON object.
    """
    files = {TOKENIZER_FILE: tokens.data}
    special = [token.text for token in more if token.special]
    config = read_object(directory / CONFIG_FILE)
    if config:
        if "added_tokens_decoder" in config or (directory / "tokenizer.model").is_file():
            config["added_tokens_decoder"] = {
                str(tokens.ids[text]): {"content": text, **{f: getattr(t, f) for f in _FLAGS}}
                for text, t in sorted(tokens.added.items(), key=lambda item: tokens.ids[item[0]])
            }
        files[CONFIG_FILE] = _with_special(config, special)
    if known := read_object(directory / _MAP_FILE):
        files[_MAP_FILE] = _with_special(known, special)
    if listed := read_object(directory / ADDED_FILE):
        files[ADDED_FILE] = {**listed, **{t.text: tokens.ids[t.text] for t in more}}
    return {name: as_bytes(data) for name, data in files.items()}


def unknown_to_converter(tokens: Tokens, more: Sequence[Token]) -> list[str]:
    """Which of the tokens `more` keep llama.cpp's converter from knowing the tokenizer."""
    return [token.text for token in more if tokens.spelling == "bytes" and token.text in _CHECKED]


def with_template(
    directory: Path, written: Mapping[str, bytes], template: Any, ends: Sequence[int]
) -> dict[str, bytes]:
    """The same with another model's chat template, whose texts end with one of the tokens `ends`.

    Raises:
        ValueError: a file that must tell of it is no JSON object.
    """
    config = _current(directory, written, CONFIG_FILE)
    generation = _current(directory, written, GENERATION_FILE)
    own = generation.get("eos_token_id")
    known = own if isinstance(own, list) else [] if own is None else [own]
    generation["eos_token_id"] = [*known, *(number for number in ends if number not in known)]
    return {
        **written,
        CONFIG_FILE: as_bytes({**config, "chat_template": template}),
        GENERATION_FILE: as_bytes(generation),
    }


def chat_template(directory: Path, written: Mapping[str, bytes] | None = None) -> Any:
    """A model's chat template, one text or several by name; None if there is none to be read.

    Of the files in `directory`, those that are `written` count instead.
    """
    try:
        if (directory / "chat_template.jinja").is_file():
            return (directory / "chat_template.jinja").read_text(encoding="utf-8")
        for name in ("chat_template.json", CONFIG_FILE):
            if template := _current(directory, written or {}, name).get("chat_template"):
                return template
    except (OSError, ValueError):
        pass
    return None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file's object; an empty one if there is no such file.

    Raises:
        ValueError: it holds something else, or cannot be read.
    """
    if not path.is_file():
        return {}
    try:
        return _object(path.read_bytes(), path.name)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error


def as_bytes(data: dict[str, Any]) -> bytes:
    """A JSON file as transformers writes it."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _current(directory: Path, written: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return _object(written[name], name) if name in written else read_object(directory / name)


def _object(content: bytes, name: str) -> dict[str, Any]:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{name} is not a JSON object")
    return data


def _with_special(config: dict[str, Any], special: Sequence[str]) -> dict[str, Any]:
    """With more special tokens where it lists those without a role, under either version's name."""
    listed = isinstance(config.get("extra_special_tokens"), list)
    key = "extra_special_tokens" if listed else "additional_special_tokens"
    known = config.get(key) or []
    return {**config, key: [*known, *special]} if special else config
