"""The small files of a tokenizer to which tokens were added, as every reader needs them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moemerge.tokenizer.tokens import ADDED_FILE, CONFIG_FILE, TOKENIZER_FILE, Token, Tokens

GENERATION_FILE = "generation_config.json"
IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
"""The special tokens that config.json and generation_config.json name by their ids."""

_GENERIC = "PreTrainedTokenizerFast"
_KNOWN = frozenset(
    f"{name}Tokenizer"
    for name in (
        "Albert", "Bert", "BertJapanese", "Bloom", "CodeGen", "CodeLlama", "Cohere", "GPT2",
        "GPTNeoX", "GPTNeoXJapanese", "GPTSw3", "Gemma", "Llama", "MistralCommon", "PreTrained",
        "Qwen2", "Roberta", "Siglip", "T5", "XGLM", "XLMRoberta",
    )
) | {"MistralCommonBackend", "PythonBackend", "TokenizersBackend"}  # fmt: skip
"""Tokenizer classes of transformers for models of the families here, without their suffix `Fast`.
"""

_MAP_FILE = "special_tokens_map.json"
_CHECKED = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ "
    "(multiple emojis concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 "
    "3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= "
    "нещо на Български ''''''```````\"\"\"\"......"
    "!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)  # fmt: skip
"""The text by which llama.cpp's converter identifies a byte-level BPE tokenizer.

It is `CHK_TXT` in convert_hf_to_gguf_update.py. The tokenizer must read this text as a tokenizer
that llama.cpp knows.
"""

_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")


def with_added_tokens(directory: Path, tokens: Tokens, more: Sequence[Token]) -> dict[str, bytes]:
    """The files of `directory` that must list the tokens `more`, which are at the end of `tokens`:
    contents by file name.

    transformers 5 and mlx-lm read tokenizer.json. transformers 4 also reads the added tokens in
    tokenizer_config.json. llama.cpp's converter reads these too if there is a tokenizer.model,
    because that file does not have them.

    Raises:
        ValueError: one of the files is not a JSON object.
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
    """The tokens of `more` that keep llama.cpp's converter from identifying the tokenizer."""
    return [token.text for token in more if tokens.spelling == "bytes" and token.text in _CHECKED]


def with_template(
    directory: Path, written: Mapping[str, bytes], template: Any, ends: Sequence[int]
) -> dict[str, bytes]:
    """The files with another model's chat template, whose texts end with one of the tokens `ends`.

    Raises:
        ValueError: a file that must change is not a JSON object.
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


def portable(name: str, content: bytes, fast: bool, rows: int) -> tuple[bytes, list[str]]:
    """A carried file in a form that every reader of the mixture knows, and notes on what changed.

    Other files are returned unchanged. `fast` says that the output has a tokenizer.json. `rows` is
    the number of rows of the embeddings.
    """
    change = {CONFIG_FILE: partial(_without_code, fast=fast), GENERATION_FILE: partial(_ids, rows)}
    try:
        data = _object(content, name) if name in change else {}
    except ValueError:
        return content, []
    before = dict(data)
    notes = [f"{name}: {note}" for note in (change[name](data) if data else ())]
    return (as_bytes(data) if data != before else content), notes


def within(said: Any, rows: int) -> Any:
    """The ids that are below `rows`, of one id or a list; any other value is returned unchanged."""
    if isinstance(said, list):
        return [one for one in said if within(one, rows) is not None] or None
    return None if type(said) is int and not 0 <= said < rows else said


def _without_code(config: dict[str, Any], fast: bool) -> Iterator[str]:
    """A tokenizer's config without program code that is not copied.

    A class that needs such code becomes the generic fast tokenizer. So does transformers 5's
    `TokenizersBackend`, which is `PreTrainedTokenizerFast` in version 4; that class returns
    token_type_ids, which no decoder takes, unless the config names the model's inputs. A list of
    `extra_special_tokens` becomes `additional_special_tokens`.
    """
    own, code = config.get("tokenizer_class"), config.get("auto_map")
    classes = code.get("AutoTokenizer") if isinstance(code, dict) else code
    named = [str(one) for one in (classes if isinstance(classes, list) else [classes]) if one]
    unknown = isinstance(own, str) and own.removesuffix("Fast") not in _KNOWN
    coded = unknown or any(not own or one.endswith(f".{own}") for one in named)
    if coded and not fast:
        yield f"{own or named[0]} is program code, which does not go along: copy it"
        return
    config.pop("auto_map", None)
    if coded:
        yield f"{own or named[0]}, whose code does not go along, becomes {_GENERIC}"
    elif code is not None:
        yield f"its auto_map names program code, which does not go along; {own} is used"
    if coded or own == "TokenizersBackend":
        config["tokenizer_class"] = _GENERIC
        config.setdefault("model_input_names", ["input_ids", "attention_mask"])
        if isinstance(config.get("extra_special_tokens"), list):
            config["additional_special_tokens"] = config.pop("extra_special_tokens")


def _ids(rows: int, config: dict[str, Any]) -> Iterator[str]:
    """The config without ids for which the embeddings have no row."""
    for key in IDS:
        said = config.get(key)
        kept = within(said, rows)
        if kept != said:
            yield f"{key} is {said}, the vocabulary has {rows} ids: written as {kept}"
            config[key] = kept
            if kept is None:
                del config[key]


def chat_template(directory: Path, written: Mapping[str, bytes] | None = None) -> Any:
    """A model's chat template: one text, or several by name; None if there is none that can be
    read.

    Files that are in `written` count instead of those in `directory`.
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
        ValueError: the file holds something else, or cannot be read.
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
    """The config with more special tokens in its list of those without a role, under the name of
    either version."""
    listed = isinstance(config.get("extra_special_tokens"), list)
    key = "extra_special_tokens" if listed else "additional_special_tokens"
    known = config.get(key) or []
    return {**config, key: [*known, *special]} if special else config
