"""Hunyuan (dense): a Llama with norms of queries and keys after rope."""

from __future__ import annotations

from typing import Any

from moemerge.families.family import Family
from moemerge.families.names import LAYER
from moemerge.families.rope import both_forms
from moemerge.families.tensors import Shapes, attention

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 290943, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "hidden_act": "silu",
    "max_position_embeddings": 2048, "initializer_range": 0.02, "rms_norm_eps": 1e-5,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    "attention_bias": False, "attention_dropout": 0.0, "head_dim": None,
}  # fmt: skip


def _settle(said: dict[str, Any]) -> dict[str, Any]:
    """Heads as numbers, and rope for both versions of transformers."""
    heads, groups = said["num_attention_heads"], said["num_key_value_heads"]
    made = {**said, **both_forms(said, 10_000.0)}
    scaling = made["rope_parameters"]
    return {
        **made,
        "rope_scaling": None if scaling["rope_type"] == "default" else said.get("rope_scaling"),
        "num_key_value_heads": heads if groups is None else groups,
        "head_dim": said["head_dim"] or said["hidden_size"] // heads,
    }


def _layer(config: dict[str, Any], number: int) -> Shapes:
    """A Llama's layer, and norms of each head's queries and keys."""
    layer, bias = LAYER.format(layer=number), bool(config["attention_bias"])
    return {
        **attention({**config, "qkv_bias": bias, "o_bias": bias}, number),
        f"{layer}self_attn.query_layernorm.weight": (config["head_dim"],),
        f"{layer}self_attn.key_layernorm.weight": (config["head_dim"],),
    }


FAMILIES = (
    Family(
        "hunyuan_v1_dense",
        "HunYuanDenseV1ForCausalLM",
        _DEFAULTS,
        layers="hunyuan",
        settle=_settle,
        layer=_layer,
    ),
)
