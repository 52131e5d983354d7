"""Ministral 3: a Mistral whose queries grow with the position, beyond its original context."""

from __future__ import annotations

from typing import Any

from moemerge.families.rope import TRAINED
from moemerge.families.types.mistral import MISTRAL

_BETA = "llama_4_scaling_beta"


def _settle(said: dict[str, Any]) -> dict[str, Any]:
    """The growth of queries at the top, because rope does not know this key.

    Raises:
        ValueError: rope is not said, or not as this family says it.
    """
    stated = said.get("rope_parameters") or said.get("rope_scaling")
    if not isinstance(stated, dict) or not stated.get(TRAINED):
        raise ValueError(f"rope_parameters has no {TRAINED}, which a ministral3 needs")
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(said.get(key), dict) and _BETA in said[key]:
            rest = {name: value for name, value in said[key].items() if name != _BETA}
            said = {**said, key: rest, _BETA: said[key][_BETA]}
    return said


def _limit(config: dict[str, Any]) -> str:
    trained = (config["rope_scaling"] or {}).get(TRAINED) or config["max_position_embeddings"]
    if not config.get(_BETA):
        return ""
    return (
        f"exact up to {trained} tokens, its original context: beyond, a ministral3 scales queries "
        "by position, and no mixture does"
    )


FAMILIES = (
    MISTRAL.saved_as(
        "ministral3",
        {
            "vocab_size": 131072, "num_hidden_layers": 34, "max_position_embeddings": 262144,
            "head_dim": 128, "rms_norm_eps": 1e-5, "pad_token_id": 11, "sliding_window": None,
        },
        settle=_settle,
        limit=_limit,
    ),
)  # fmt: skip
