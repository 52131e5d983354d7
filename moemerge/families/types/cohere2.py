"""Cohere 2 (Command R7B and A): attention and MLP side by side, windows in most layers."""

from __future__ import annotations

from typing import Any

from moemerge.families.family import Family
from moemerge.families.names import LAYER
from moemerge.families.rope import both_forms
from moemerge.families.tensors import Shapes, projections

SLIDING, FULL = "sliding_attention", "full_attention"

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 256000, "hidden_size": 8192, "intermediate_size": 22528, "logit_scale": 0.0625,
    "num_hidden_layers": 40, "num_attention_heads": 64, "num_key_value_heads": None,
    "hidden_act": "silu", "max_position_embeddings": 8192, "initializer_range": 0.02,
    "layer_norm_eps": 1e-5, "pad_token_id": 0, "bos_token_id": 5, "eos_token_id": 255001,
    "tie_word_embeddings": True, "attention_bias": False, "attention_dropout": 0.0,
    "sliding_window": 4096, "layer_types": None,
}  # fmt: skip


def _settle(said: dict[str, Any]) -> dict[str, Any]:
    """The kind of each layer: every fourth attends to everything, without positions."""
    layers, every = said["num_hidden_layers"], said.get("sliding_window_pattern", 4)
    types = said["layer_types"]
    if types is None and type(every) is int and every > 0:
        types = [SLIDING if (layer + 1) % every else FULL for layer in range(layers)]
    groups, heads = said["num_key_value_heads"], said["num_attention_heads"]
    return {
        **{key: value for key, value in said.items() if key != "sliding_window_pattern"},
        **both_forms(said, 10_000.0),
        "layer_types": types,
        "num_key_value_heads": heads if groups is None else groups,
        "head_dim": said["hidden_size"] // heads,
    }


def _layer(config: dict[str, Any], number: int) -> Shapes:
    """One norm, before both attention and MLP."""
    layer, bias = LAYER.format(layer=number), bool(config["attention_bias"])
    own = {**config, "qkv_bias": bias, "o_bias": bias}
    return {
        f"{layer}input_layernorm.weight": (config["hidden_size"],),
        **projections(own, f"{layer}self_attn."),
    }


FAMILIES = (
    Family(
        "cohere2",
        "Cohere2ForCausalLM",
        _DEFAULTS,
        layers="cohere 2",
        usual={"rms_norm_eps": "layer_norm_eps"},
        kinds=(SLIDING, FULL),
        numbers=("sliding_window",),
        settle=_settle,
        layer=_layer,
    ),
)
