"""The names of a dense model's tensors, the same in every family."""

from __future__ import annotations

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
LAYER = "model.layers.{layer}."
TEXT_PREFIX = "model.language_model."
"""In place of `model.` in models that also see or hear."""
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"


def dense(layer: int, which: str) -> str:
    """A dense MLP's matrix."""
    return f"{LAYER.format(layer=layer)}mlp.{which}.weight"
