"""Qwen 3.5 and 3.6: three layers of linear attention to one of attention with a gate."""

from __future__ import annotations

from typing import Any

from moemerge.families.family import Family
from moemerge.families.names import LAYER
from moemerge.families.rope import both_forms
from moemerge.families.tensors import Shapes, projections

LINEAR, FULL = "linear_attention", "full_attention"

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 248320, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32,
    "num_attention_heads": 16, "num_key_value_heads": 4, "hidden_act": "silu", "head_dim": 256,
    "max_position_embeddings": 32768, "initializer_range": 0.02, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "attention_bias": False, "attention_dropout": 0.0,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "layer_types": None,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    "partial_rotary_factor": 0.25,
}  # fmt: skip


def _settle(said: dict[str, Any]) -> dict[str, Any]:
    """The kind of each layer, and rope for every program; without a block that predicts further."""
    layers, every = said["num_hidden_layers"], said.get("full_attention_interval", 4)
    types = said["layer_types"]
    if types is None and type(every) is int and every > 0:
        types = [LINEAR if (layer + 1) % every else FULL for layer in range(layers)]
    if isinstance(types, list) and FULL in types:
        every = types.index(FULL) + 1
    said = {key: value for key, value in said.items() if not key.startswith("mtp_")}
    return {
        **said,
        **both_forms(said, 10_000.0),
        "layer_types": types,
        "full_attention_interval": every,  # mlx-lm reads it
        "attention_bias": said["attention_bias"],
    }


def _layer(config: dict[str, Any], number: int) -> Shapes:
    """Linear attention with a convolution over time, or attention with queries and their gates."""
    layer, hidden = LAYER.format(layer=number), config["hidden_size"]
    norms = {f"{layer}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    if config["layer_types"][number] == FULL:
        bias = bool(config["attention_bias"])
        own = {**config, "qk_norm": "head", "qkv_bias": bias, "o_bias": bias}
        found = projections(own, f"{layer}self_attn.")
        for name in ("weight", *(["bias"] if bias else [])):  # each head's queries and its gate
            rows, *width = found[f"{layer}self_attn.q_proj.{name}"]
            found[f"{layer}self_attn.q_proj.{name}"] = (2 * rows, *width)
        return found | norms
    heads, value_heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    keys, values = (
        heads * config["linear_key_head_dim"],
        value_heads * config["linear_value_head_dim"],
    )
    mixed = 2 * keys + values
    return {
        f"{layer}linear_attn.dt_bias": (value_heads,),
        f"{layer}linear_attn.A_log": (value_heads,),
        f"{layer}linear_attn.conv1d.weight": (mixed, 1, config["linear_conv_kernel_dim"]),
        f"{layer}linear_attn.norm.weight": (config["linear_value_head_dim"],),
        f"{layer}linear_attn.out_proj.weight": (hidden, values),
        f"{layer}linear_attn.in_proj_qkv.weight": (mixed, hidden),
        f"{layer}linear_attn.in_proj_z.weight": (values, hidden),
        f"{layer}linear_attn.in_proj_b.weight": (value_heads, hidden),
        f"{layer}linear_attn.in_proj_a.weight": (value_heads, hidden),
        **norms,
    }  # fmt: skip


FAMILIES = (
    Family(
        "qwen3_5_text",
        "Qwen3_5ForCausalLM",
        _DEFAULTS,
        layers="qwen 3.5",
        kinds=(LINEAR, FULL),
        numbers=(
            "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim",
            "linear_num_key_heads", "linear_num_value_heads",
        ),
        settle=_settle,
        layer=_layer,
        inside={"qwen3_5": "Qwen3_5ForConditionalGeneration"},
    ),
)  # fmt: skip
