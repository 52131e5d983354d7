"""OLMo 3: an OLMo 2 with windows in most layers, which the mixture does not have."""

from __future__ import annotations

from typing import Any

from moemerge.families.types.olmo2 import OLMO2

_THETA = 500_000.0


def _settle(said: dict[str, Any]) -> dict[str, Any]:
    """One rope for all layers, if both kinds of layers have the same.

    transformers gives a `rope_theta` that stands alone to layers of full attention only.

    Raises:
        ValueError: rope differs by kind of layer.
    """
    own, alone = said.get("rope_parameters"), said["rope_theta"]
    kinds = [kind for kind in own.values() if isinstance(kind, dict)] if own else []
    own = kinds[0] if kinds else {"rope_theta": alone, "rope_type": "default"}
    if any(kind != own for kind in kinds) or (not kinds and alone != _THETA):
        raise ValueError("rope differs between its kinds of layers, and no mixture class has this")
    return {**said, "rope_parameters": own, "window": said["sliding_window"]}


def _limit(config: dict[str, Any]) -> str:
    window = config["window"]
    if not isinstance(window, int) or window >= config["max_position_embeddings"]:
        return ""
    return (
        f"exact up to {window} tokens: beyond, an olmo3 has windows in most layers, and a "
        "flex_olmo attends to everything"
    )


FAMILIES = (
    OLMO2.saved_as(
        "olmo3",
        {"rope_theta": _THETA, "sliding_window": 4096},
        reads_layer_types=False,
        ropes=("default",),
        settle=_settle,
        limit=_limit,
    ),
)
