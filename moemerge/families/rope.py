"""Rope as transformers 4 and 5 write it: every key is read once, and written for both."""

from __future__ import annotations

from typing import Any

from moemerge.families.family import Family

PARTIAL = "partial_rotary_factor"
TRAINED = "original_max_position_embeddings"

_NEEDS = {
    "default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}  # fmt: skip
"""The kinds of rope in transformers, and the keys that each needs."""

_LISTS = ("short_factor", "long_factor")
_MAY = ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_ELSEWHERE = ("rope_theta", "rope_type", "type", PARTIAL)


def settle(config: dict[str, Any], record: Family) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and `rope_parameters` that agree, and `partial_rotary_factor`.

    A value that is given twice is read as transformers 5 reads it: `rope_scaling` replaces
    `rope_parameters`, and keys in it override keys at the top, except
    `original_max_position_embeddings`, which is read at the top first.

    Raises:
        ValueError: a value is not of the type that every reader expects; says which.
    """
    stated = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(stated, dict):
        raise ValueError(f"rope_scaling is {stated!r}, not a mapping")
    stated = {key: value for key, value in stated.items() if value is not None}
    for key, value in stated.items():
        if isinstance(value, dict):
            what = f"rope_parameters has a set of its own for {key}"
            raise ValueError(f"{what}, which no {record.name} reads; write one set for all layers")
    theta = stated.get("rope_theta", config["rope_theta"])
    if not is_number(theta) or not theta > 0:
        raise ValueError(f"rope_theta is {theta!r}, not a positive number")
    kind = _kind(stated, record)
    rest = {key: value for key, value in stated.items() if key not in _ELSEWHERE}
    if kind in ("llama3", "longrope", "yarn"):
        rest |= _trained(config, rest, kind)
    part = _part(config, stated)
    _check(rest, kind, round(config["head_dim"] * part))
    return {
        **({TRAINED: rest[TRAINED]} if kind == "longrope" else {}),
        PARTIAL: part,
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"rope_type": kind, **rest},
        "rope_parameters": {"rope_type": kind, "rope_theta": theta, **rest},
    }


def both_forms(said: dict[str, Any], theta: float) -> dict[str, Any]:
    """Keys with rope as transformers 4 and 5 write it, otherwise unchanged; `theta` is the default.

    Raises:
        ValueError: a form is not a mapping.
    """
    scaling, stated = said.get("rope_scaling"), said.get("rope_parameters")
    for key, value in (("rope_scaling", scaling), ("rope_parameters", stated)):
        if not isinstance(value or {}, dict):
            raise ValueError(f"{key} is {value!r}, not a mapping")
    own = scaling or stated or {}
    found = {"rope_theta": own.get("rope_theta", said.get("rope_theta", theta))}
    if PARTIAL in said or PARTIAL in own:
        found[PARTIAL] = own.get(PARTIAL, said.get(PARTIAL))
    kind = {"rope_type": own.get("rope_type", own.get("type", "default"))}
    return {**found, "rope_parameters": {**own, **kind, **found}}


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and not true or false."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _kind(stated: dict[str, Any], record: Family) -> str:
    """The kind of rope, by its newest name; `su` is an older name of longrope."""
    kind = stated.get("rope_type") or stated.get("type") or "default"
    if isinstance(kind, str):
        kind = {"su": "longrope", **record.rope_names}.get(kind, kind)
    known = record.ropes or tuple(_NEEDS)
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"rope_type is {kind!r}, not one of {', '.join(known)}")
    return kind


def _trained(config: dict[str, Any], rest: dict[str, Any], kind: str) -> dict[str, Any]:
    """The length that the model was first trained with, and the factor by which it is longer now;
    version 4 needs keys that version 5 computes."""
    length = config["max_position_embeddings"]
    trained = config.get(TRAINED) or rest.get(TRAINED) or length
    if not is_number(trained) or not trained > 0:
        raise ValueError(f"{TRAINED} is {trained!r}, not a positive number")
    known = {TRAINED: trained}
    return known if kind == "llama3" else {**known, "factor": rest.get("factor", length / trained)}


def _part(config: dict[str, Any], stated: dict[str, Any]) -> float:
    """The part of each head that rope turns."""
    part, head = stated.get(PARTIAL, config.get(PARTIAL)), config["head_dim"]
    part = 1.0 if part is None else part
    turned = int(head * part) if is_number(part) and 0 < part <= 1 else 0
    if turned == head:
        return 1.0
    if turned < 2 or turned % 2:
        what = "no part of a head in pairs" if turned else "not a number above 0 and up to 1"
        raise ValueError(f"{PARTIAL} is {part!r} with head_dim {head}: {what}")
    return float(part)


def _check(rest: dict[str, Any], kind: str, turned: int) -> None:
    """Refuse values that are not numbers, and lists of factors without one for each pair."""
    for key in (*_NEEDS[kind], *(key for key in _MAY if key in rest and key not in _NEEDS[kind])):
        value: Any = rest.get(key)
        if key in _LISTS:
            if not (isinstance(value, list) and value and all(map(is_number, value))):
                what = f"{key} is {value!r}, which {kind} rope needs as a list of numbers"
                raise ValueError(f"rope_scaling: {what}")
            if len(value) != turned // 2:
                what = f"{key} has {len(value)} numbers, each head turns {turned // 2} pairs"
                raise ValueError(f"rope_scaling: {what}")
        elif not is_number(value) or not value >= 0 or (key == "factor" and not value):
            raise ValueError(f"rope_scaling: {key} is {value!r}, which {kind} rope needs as number")
    if not isinstance(rest.get("truncate", True), bool):
        raise ValueError(f"rope_scaling: truncate is {rest['truncate']!r}, not true or false")
