"""LFM2: short convolutions in most layers, attention in some."""

from __future__ import annotations

from typing import Any

from moemerge.families.family import Family
from moemerge.families.names import LAYER
from moemerge.families.rope import both_forms
from moemerge.families.tensors import Shapes

CONV, FULL = "conv", "full_attention"

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 65536, "hidden_size": 2560, "intermediate_size": 12288, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 128000,
    "initializer_range": 0.02, "norm_eps": 1e-5, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": True, "conv_bias": False, "conv_L_cache": 3,
    "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": True,
    "layer_types": None,
}  # fmt: skip
_COMPUTED = ("full_attn_idxs", "block_ff_dim", "tie_embedding")


def _settle(said: dict[str, Any]) -> dict[str, Any]:
    """The kind of each layer, and the width of the MLPs as the class computes it."""
    layers, types = range(said["num_hidden_layers"]), said["layer_types"]
    if types is None:
        attends = said.get("full_attn_idxs")
        types = [FULL if attends is None or layer in attends else CONV for layer in layers]
    width, many = said.get("block_ff_dim", said["intermediate_size"]), said["block_multiple_of"]
    times = said["block_ffn_dim_multiplier"]
    if said["block_auto_adjust_ff_dim"]:
        width = int(2 * width / 3)
        if times is not None:
            width = many * ((int(times * width) + many - 1) // many)
    said = {**said, "tie_word_embeddings": said.get("tie_embedding", said["tie_word_embeddings"])}
    return {
        **{key: value for key, value in said.items() if key not in _COMPUTED},
        **both_forms(said, 1_000_000.0),
        "layer_types": types,
        "intermediate_size": width,
        "block_auto_adjust_ff_dim": False,
        "head_dim": said["hidden_size"] // said["num_attention_heads"],
    }


def _layer(config: dict[str, Any], number: int) -> Shapes:
    """A convolution over time between two gates, or attention with norms of queries and keys."""
    layer, hidden, head = LAYER.format(layer=number), config["hidden_size"], config["head_dim"]
    norms = {f"{layer}{name}_norm.weight": (hidden,) for name in ("operator", "ffn")}
    if config["layer_types"][number] == FULL:
        keys = config["num_key_value_heads"] * head
        return {
            f"{layer}self_attn.q_proj.weight": (config["num_attention_heads"] * head, hidden),
            f"{layer}self_attn.k_proj.weight": (keys, hidden),
            f"{layer}self_attn.v_proj.weight": (keys, hidden),
            f"{layer}self_attn.out_proj.weight": (hidden, config["num_attention_heads"] * head),
            f"{layer}self_attn.q_layernorm.weight": (head,),
            f"{layer}self_attn.k_layernorm.weight": (head,),
            **norms,
        }
    found: Shapes = {
        f"{layer}conv.conv.weight": (hidden, 1, config["conv_L_cache"]),
        f"{layer}conv.in_proj.weight": (3 * hidden, hidden),
        f"{layer}conv.out_proj.weight": (hidden, hidden),
    }
    if config["conv_bias"]:
        rows = {name: shape[0] for name, shape in found.items()}
        found |= {f"{name.removesuffix('weight')}bias": (size,) for name, size in rows.items()}
    return found | norms


def _top(config: dict[str, Any]) -> Shapes:
    """The final norm, under its own name."""
    return {"model.embedding_norm.weight": (config["hidden_size"],)}


FAMILIES = (
    Family(
        "lfm2",
        "Lfm2ForCausalLM",
        _DEFAULTS,
        layers="lfm2",
        usual={"rms_norm_eps": "norm_eps"},
        kinds=(CONV, FULL),
        numbers=("conv_L_cache",),
        settle=_settle,
        layer=_layer,
        top=_top,
        fused={
            "feed_forward.w1": {"mlp.gate_proj": ""},
            "feed_forward.w3": {"mlp.up_proj": ""},
            "feed_forward.w2": {"mlp.down_proj": ""},
        },
    ),
)
