"""Compares each expert with the base model: differences that forbid a merge, and other ones."""

from __future__ import annotations

from typing import Any

from moemerge.checkpoint import Donor
from moemerge.errors import Findings
from moemerge.families import record_of
from moemerge.text import Vocabulary
from moemerge.tokenizer import Comparison, chat_template, compare_contents, read_content, shown

_MUST_AGREE = ("num_hidden_layers", "hidden_size", "intermediate_size", "hidden_act")
_ATTENTION_STAYS = "its attention is not used"
_MAY_DIFFER = {
    "vocab_size": "its embeddings are not used",
    "rope_parameters": _ATTENTION_STAYS,
    "num_attention_heads": _ATTENTION_STAYS,
    "num_key_value_heads": _ATTENTION_STAYS,
    "head_dim": _ATTENTION_STAYS,
    "partial_rotary_factor": _ATTENTION_STAYS,
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
    vocabulary: Vocabulary | None = None,
) -> None:
    """Record every difference between the base model and one expert.

    A difference of depth, width, activation or family is a problem, because the expert's MLPs would
    then not work in the base model's body. Other differences are notes, because only the MLPs are
    used. With `attention`, the expert's attention is averaged with others', so it must agree too.
    With `runs`, the expert's own model runs, so its token ids must be the same as in the mixture's
    `vocabulary`, by default the base model's.
    """
    ours, theirs = base.model.config, expert.model.config
    family, other = ours.get("model_type"), theirs.get("model_type")
    record = record_of(ours)
    if family != other and not (record and other in record.alike) and not allow_crimes:
        findings.problem(
            where,
            f"model_type is {other!r}, the base model's is {family!r}",
            "pass --allow-crimes if you know that both names mean the same family",
        )
    for key in _MUST_AGREE:
        if _same_value(theirs.get(key)) != _same_value(ours.get(key)):
            findings.problem(
                where,
                f"{key} is {theirs.get(key)}, the base model's is {ours.get(key)}",
                "every expert must match the base",
            )
    for key, why in _MAY_DIFFER.items():
        if theirs.get(key) == ours.get(key) or (attention and key == "vocab_size"):
            continue  # shared rows can be averaged, and `same_tokens` reports the other rows
        if attention and why == _ATTENTION_STAYS:
            findings.problem(
                where,
                f"{key} is {_short(theirs.get(key))}, the base model's is {_short(ours.get(key))}",
                "such attentions have no average: use body: base",
            )
        elif not (key == "vocab_size" and vocabulary and vocabulary.has_rows_of(expert)):
            its, own = _short(theirs.get(key)), _short(ours.get(key))
            findings.note_of(expert.name, f"{key} is {its}, the base model's is {own}; {why}")
    vocabulary = vocabulary or Vocabulary(base, base.model.directory)
    _compare_vocabularies(base, expert, vocabulary, where, findings, runs)


def _compare_vocabularies(
    base: Donor,
    expert: Donor,
    vocabulary: Vocabulary,
    where: str,
    findings: Findings,
    runs: bool,
) -> None:
    ours, theirs = (donor.model.directory for donor in (base, expert))
    if ours == theirs:
        return
    try:
        found = compare_contents(read_content(ours), read_content(theirs))
    except ValueError as error:
        found = Comparison()
        line = f"its tokens cannot be compared with the base's: {error}"
        findings.note_of(expert.name, line)
    if found:
        stays = vocabulary.directory == ours and not vocabulary.written
        kept = "; prompts and text are the base's" if stays else ""
        if stays and found.more:
            kept += " (tokenizer: union would add its tokens)"
        findings.note_of(expert.name, f"{found}{kept}")
    template = chat_template(theirs)
    if template and template != vocabulary.template:
        findings.note_of(expert.name, "its chat template differs from the mixture's")
    if moved := _moved(vocabulary, expert) if runs else ():
        what = f"{len(moved)} tokens have other ids than in the mixture ({shown(moved)})"
        fix = "its text would be read wrongly: use gate_mode: ridge with prompts"
        findings.problem(where, what, fix)


def _moved(vocabulary: Vocabulary, donor: Donor) -> tuple[str, ...]:
    """The donor's tokens that have a different id in the mixture's vocabulary."""
    try:
        theirs = read_content(donor.model.directory)
        return compare_contents(vocabulary.tokenizer(), theirs).moved
    except ValueError:
        return ()


def _same_value(value: Any) -> Any:
    return {"swish": "silu"}.get(value, value) if isinstance(value, str) else value


def _short(value: Any) -> str:
    return (
        ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
    )
