"""Qwen 3 VL: a Qwen 3 whose positions have three parts, behind a vision tower."""

from __future__ import annotations

from typing import Any

from moemerge.families.family import Family
from moemerge.families.names import LAYER
from moemerge.families.rope import both_forms
from moemerge.families.tensors import Shapes, projections

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "hidden_act": "silu",
    "max_position_embeddings": 128000, "initializer_range": 0.02, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "attention_bias": False, "attention_dropout": 0.0,
}  # fmt: skip


def _settle(said: dict[str, Any]) -> dict[str, Any]:
    """Rope for both versions of transformers."""
    said = {**said, **both_forms(said, 500_000.0)}
    scaling = {key: v for key, v in said["rope_parameters"].items() if key != "rope_theta"}
    return {**said, "rope_scaling": scaling}


def _layer(config: dict[str, Any], number: int) -> Shapes:
    """A Qwen 3's layer."""
    layer, bias = LAYER.format(layer=number), bool(config["attention_bias"])
    own = {**config, "qk_norm": "head", "qkv_bias": bias, "o_bias": bias}
    norms = {
        f"{layer}{name}_layernorm.weight": (config["hidden_size"],)
        for name in ("input", "post_attention")
    }
    return {**projections(own, f"{layer}self_attn."), **norms}


FAMILIES = (
    Family(
        "qwen3_vl_text",
        "",
        _DEFAULTS,
        layers="qwen 3 vl",
        settle=_settle,
        layer=_layer,
        inside={"qwen3_vl": "Qwen3VLForConditionalGeneration"},
        alike=("qwen3",),
    ),
)
