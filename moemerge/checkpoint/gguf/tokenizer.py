"""A GGUF file's tokenizer as the files of a model directory: tokenizer.json and its config.

What llama.cpp's converter drops is lost: normalisers beside NFC, and rules of tokens about spaces.
A pre-tokenizer is stored as a name alone; `_SPLITS` has the expression of each known one
(llama.cpp's src/llama-vocab.cpp).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moemerge.checkpoint.gguf.header import Header

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
"""The kinds of tokens."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "llama-bpe": rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_END}",
    "qwen2": rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_END}",
    "tekken": _CASED,
}
_ALIKE = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "smaug-bpe": "llama-bpe", "dbrx": "llama-bpe",
    "falcon3": "llama-bpe", "lfm2": "llama-bpe", "deepseek-r1-qwen": "qwen2",
    "stablelm2": "qwen2", "megrez": "qwen2",
}  # fmt: skip
_GPT2 = ("default", "gpt-2", "gpt2", "olmo", "dolma", "phi-2", "mpt")
_DIGITS = ("smollm", "starcoder", "codeshell", "refact", "command-r", "exaone")
_COMPOSED = ("qwen2", "deepseek-r1-qwen", "stablelm2")
"""Those whose text is normalised to NFC."""

_BEGUN = ("llama3", "llama-v3", "llama-bpe", "falcon3", "lfm2", "tekken")
"""Those whose text begins with a token, if the file does not say whether."""


def files_of(header: Header) -> dict[str, bytes]:
    """The tokenizer's files by name; no tokenizer.json if its kind is not known.

    Raises:
        ValueError: the tokenizer's fields contradict each other.
    """
    tokens = header.value("tokenizer.ggml.tokens", list)
    if not tokens:
        return {}
    kinds = header.value("tokenizer.ggml.token_type", list, [NORMAL] * len(tokens))
    if len(kinds) != len(tokens) or not isinstance(tokens[0], str):
        raise ValueError(f"its tokenizer has {len(tokens)} tokens and {len(kinds)} types of them")
    named = {
        f"{name}_token": tokens[number]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (number := header.value(f"tokenizer.ggml.{key}_token_id", int)) is not None
        and 0 <= number < len(tokens)
    }
    said: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **named,
    }
    if template := header.value("tokenizer.chat_template", str):
        said["chat_template"] = template
    made = {"tokenizer_config.json": json.dumps(said, ensure_ascii=False, indent=2).encode()}
    whole = _whole(header, tokens, kinds, named)
    if whole:
        made["tokenizer.json"] = json.dumps(whole, ensure_ascii=False).encode()
    return made


def _whole(
    header: Header, tokens: list[str], kinds: list[int], named: dict[str, str]
) -> dict[str, Any]:
    """The content of tokenizer.json; empty if the tokenizer's kind is not known."""
    model = header.value("tokenizer.ggml.model", str)
    pre = header.value("tokenizer.ggml.pre", str, "default")
    if model == "llama":
        parts = _pieces(header, tokens, kinds, named)
    elif model == "gpt2" and (splits := _splits(pre)):
        merges = [one.split(" ", 1) for one in header.value("tokenizer.ggml.merges", list, [])]
        whole = {"type": "BPE", "vocab": _numbered(tokens), "merges": merges, "unk_token": None}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        parts = {
            "normalizer": {"type": "NFC"} if pre in _COMPOSED else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
            "decoder": {**byte_level, "use_regex": True},
            "model": {**whole, "byte_fallback": False, "fuse_unk": False, "ignore_merges": True},
        }
    else:
        return {}
    added = [
        {"id": number, "content": token, "special": kinds[number] == CONTROL, "single_word": False,
         "lstrip": False, "rstrip": False, "normalized": False}
        for number, token in enumerate(tokens) if kinds[number] in (CONTROL, USER)
    ]  # fmt: skip
    first = header.value("tokenizer.ggml.add_bos_token", bool, model == "llama" or pre in _BEGUN)
    bos = named.get("bos_token", "")
    process = None
    if first and bos:
        number = tokens.index(bos)
        begin, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"id": "A", "type_id": 0}
        other = [
            {"SpecialToken": {"id": bos, "type_id": 1}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ]
        process = {
            "type": "TemplateProcessing",
            "single": [begin, {"Sequence": text}],
            "pair": [begin, {"Sequence": text}, *other],
            "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
        }
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    return {**head, "post_processor": process, **parts}


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def _splits(pre: str) -> list[dict[str, Any]]:
    """The pre-tokenizers of a name; empty if it is not known."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if pre in _GPT2:
        return [{**level, "use_regex": True}]
    if pre in _DIGITS:
        return [{"type": "Digits", "individual_digits": True}, {**level, "use_regex": True}]
    split = _SPLITS.get(_ALIKE.get(pre, pre))
    if split is None:
        return []
    one = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
    return [one, {**level, "use_regex": False}]


def _pieces(
    header: Header, tokens: list[str], kinds: list[int], named: dict[str, str]
) -> dict[str, Any]:
    """The parts of a SentencePiece BPE: pieces with scores, the best merged first."""
    scores = header.value("tokenizer.ggml.scores", list, [])
    if len(scores) != len(tokens):
        raise ValueError(f"its tokenizer has {len(tokens)} tokens and {len(scores)} scores")
    space = header.value("tokenizer.ggml.add_space_prefix", bool, True)
    before = [{"type": "Prepend", "prepend": "▁"}] if space else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    after = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"},
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if space else []),
    ]  # fmt: skip
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": after},
        "model": {
            "type": "BPE",
            "vocab": _numbered(tokens),
            "merges": list(_merges(tokens, kinds, scores)),
            "unk_token": named.get("unk_token"),
            "byte_fallback": True,
            "fuse_unk": True,
            "ignore_merges": False,
        },
    }


def _merges(tokens: list[str], kinds: list[int], scores: list[float]) -> Iterator[list[str]]:
    """Each pair of pieces that makes a piece, that with the best score first."""
    known = {token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL}
    number = _numbered(tokens)
    found = []
    for at, token in enumerate(tokens):
        if kinds[at] != NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in known and right in known:
                found.append((-scores[at], number[left], number[right], left, right))
    found.sort()
    for *_, left, right in found:
        yield [left, right]


def fields_of_files(directory: Path, rows: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a model directory's tokenizer; `rows` is the number of its embeddings.

    Raises:
        ValueError: there is none, or llama.cpp has no name for its kind.
    """
    try:
        data = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
        model, own = data["model"], data.get("added_tokens") or ()
        vocabulary: dict[str, int] = model["vocab"]
        told = _object(directory / "tokenizer_config.json")
        if model.get("type") != "BPE":
            raise ValueError(f"its tokenizer is {model.get('type')}, not BPE")
        pairs = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its tokenizer.json cannot be read ({error})") from error
    added = {one["content"]: one for one in own}
    numbered = {**vocabulary, **{text: one["id"] for text, one in added.items()}}
    if numbered and max(numbered.values()) >= rows:
        raise ValueError(f"its tokenizer has more tokens than its {rows} embeddings")
    tokens = [f"[PAD{number}]" for number in range(rows)]
    kinds = [UNUSED] * rows
    pieces = bool(model.get("byte_fallback"))
    for token, number in numbered.items():
        tokens[number], kinds[number] = token, NORMAL
        if token in added:
            kinds[number] = CONTROL if added[token].get("special") else USER
        elif pieces and len(token) == 6 and token.startswith("<0x"):
            kinds[number] = BYTE
    made: dict[str, Any] = {"tokenizer.ggml.model": "llama" if pieces else "gpt2"}
    if pieces:
        made |= {
            "tokenizer.ggml.scores": _scores(tokens, pairs),
            "tokenizer.ggml.add_space_prefix": "Prepend" in json.dumps(data.get("normalizer")),
        }
    else:
        made |= {"tokenizer.ggml.pre": _name_of(data), "tokenizer.ggml.merges": pairs}
        if isinstance(space := told.get("add_prefix_space"), bool):
            made["tokenizer.ggml.add_space_prefix"] = space
    made |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for ours, theirs in names.items():
        said = told.get(f"{ours}_token")
        said = said.get("content") if isinstance(said, dict) else said
        number = numbered.get(said, config.get(f"{ours}_token_id")) if said else None
        number = config.get(f"{ours}_token_id") if number is None else number
        if isinstance(number, int) and 0 <= number < rows:
            made[f"tokenizer.ggml.{theirs}_token_id"] = number
            if pieces and ours == "unk":
                kinds[number] = UNKNOWN
    first = json.dumps((data.get("post_processor") or {}).get("single", ""))
    bos = made.get("tokenizer.ggml.bos_token_id")
    begins = bos is not None and f'"id": {json.dumps(tokens[bos])}' in first
    made["tokenizer.ggml.add_bos_token"] = bool(told.get("add_bos_token", begins))
    template = told.get("chat_template")
    file = directory / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else template
    return made | ({"tokenizer.chat_template": template} if isinstance(template, str) else {})


def _object(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Each piece's score: the earlier it is merged, the higher."""
    ranks = {
        pair.replace(" ", "", 1): -float(rank) for rank, pair in reversed([*enumerate(merges)])
    }
    return [ranks.get(token, -1e6) for token in tokens]


def _name_of(data: Mapping[str, Any]) -> str:
    """llama.cpp's name of a tokenizer.json's pre-tokenizer.

    Raises:
        ValueError: it has none that is known.
    """
    said = data.get("pre_tokenizer") or {}
    steps = said.get("pretokenizers", [said])
    kinds = [one.get("type") for one in steps]
    composed = "NFC" in json.dumps(data.get("normalizer"))
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        split = (steps[0].get("pattern") or {}).get("Regex")
        for name, known in _SPLITS.items():
            if split == known and (name in _COMPOSED) == composed:
                return name
    raise ValueError("its pre-tokenizer is none that moemerge can name for llama.cpp")
