"""Base against expert: what makes the expert's MLPs wrong in the base's body, and what might."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moemerge.checkpoint import Donor
from moemerge.errors import Findings

_MUST_AGREE = ("num_hidden_layers", "hidden_size", "intermediate_size", "hidden_act")
_ATTENTION_STAYS = "its attention is not used"
_MAY_DIFFER = {
    "vocab_size": "its embeddings are not used",
    "rope_parameters": _ATTENTION_STAYS,
    "num_attention_heads": _ATTENTION_STAYS,
    "num_key_value_heads": _ATTENTION_STAYS,
    "head_dim": _ATTENTION_STAYS,
    "sliding_window": _ATTENTION_STAYS,
    "rms_norm_eps": "the base's applies",
}


def compare(
    base: Donor,
    expert: Donor,
    where: str,
    findings: Findings,
    allow_crimes: bool = False,
    attention: bool = False,
    runs: bool = False,
) -> None:
    """Record every difference between the base model and one expert.

    Depth, width, activation and family decide whether the expert's MLPs see in the base's body what
    they saw in their own: a difference there is a problem. Everything else of the expert stays
    behind, so a difference is a note; but where its `attention` is averaged with others', that must
    agree too, and where the expert itself `runs`, its tokens must be the base model's.
    """
    ours, theirs = base.model.config, expert.model.config
    family, other = ours.get("model_type"), theirs.get("model_type")
    if family != other and not allow_crimes:
        findings.problem(
            where,
            f"model_type is {other!r}, the base model's is {family!r}",
            "pass --allow-crimes if you know that the one is the other under another name",
        )
    for key in _MUST_AGREE:
        if _same_value(theirs.get(key)) != _same_value(ours.get(key)):
            findings.problem(
                where,
                f"{key} is {theirs.get(key)}, the base model's is {ours.get(key)}",
                "every expert must match the base",
            )
    for key, why in _MAY_DIFFER.items():
        if theirs.get(key) == ours.get(key):
            continue
        if attention and why == _ATTENTION_STAYS:
            findings.problem(
                where,
                f"{key} is {_short(theirs.get(key))}, the base model's is {_short(ours.get(key))}",
                "such attentions have no average: use body: base",
            )
        else:
            findings.note(
                f"{expert.name}: {key} is {_short(theirs.get(key))}, the base model's is "
                f"{_short(ours.get(key))}; {why}"
            )
    line = _compare_vocabularies(base.model.directory, expert.model.directory)
    if line and runs:
        fix = "its text would be read as another: use gate_mode: ridge with prompts"
        findings.problem(where, line, fix)
    elif line:
        findings.note(f"{expert.name}: {line}")


def same_vocabulary(base: Donor, expert: Donor) -> bool:
    """Whether each token has one id, and its rows in embedding and head one place, in both."""
    configs = [donor.model.config for donor in (base, expert)]
    shapes = {(c.get("vocab_size"), c.get("tie_word_embeddings")) for c in configs}
    line = _compare_vocabularies(base.model.directory, expert.model.directory)
    return len(shapes) == 1 and line is None


def _compare_vocabularies(base: Path, expert: Path) -> str | None:
    """Say whether the two tokenizers give some text other ids; None where they agree."""
    ours, theirs = (path / "tokenizer.json" for path in (base, expert))
    try:
        if base == expert or ours.read_bytes() == theirs.read_bytes():
            return None
        left, right = _vocabulary(ours), _vocabulary(theirs)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    moved = [token for token, number in right.items() if left.get(token, number) != number]
    if not moved:
        return None
    shown = ", ".join(repr(token) for token in sorted(moved)[:3])
    return (
        f"{len(moved)} tokens have other ids than in the base model ({shown}); "
        "prompts and text are the base's"
    )


def _vocabulary(path: Path) -> dict[str, int]:
    data = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = data["model"]["vocab"]
    if isinstance(vocabulary, list):  # a Unigram model lists [token, score]
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    added = {token["content"]: token["id"] for token in data.get("added_tokens", [])}
    return {**vocabulary, **added}


def _same_value(value: Any) -> Any:
    return {"swish": "silu"}.get(value, value) if isinstance(value, str) else value


def _short(value: Any) -> str:
    return (
        ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
    )
