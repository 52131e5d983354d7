"""Granite 4 without experts: Mamba in most layers or none, the multipliers of a Granite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moemerge.families.family import Family
from moemerge.families.names import LAYER
from moemerge.families.rope import both_forms
from moemerge.families.tensors import Shapes, mamba, projections

MAMBA, FULL = "mamba", "attention"
_NEWER = {"linear_attention": MAMBA, "full_attention": FULL}

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "hidden_act": "silu",
    "max_position_embeddings": 2048, "initializer_range": 0.02, "rms_norm_eps": 1e-6,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    "attention_bias": False, "attention_dropout": 0.0, "embedding_multiplier": 1.0,
    "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0,
    "num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 1024,
    "position_embedding_type": None, "layer_types": None, "mamba_n_heads": 128,
    "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_head": "auto", "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_proj_bias": False,
}  # fmt: skip


def _settle(said: dict[str, Any]) -> dict[str, Any]:
    """The kind of each layer by its older name, which every program knows; sizes as numbers."""
    types, heads = said["layer_types"], said["num_attention_heads"]
    types = [MAMBA] * said["num_hidden_layers"] if types is None else types
    if isinstance(types, list):
        types = [_NEWER.get(str(kind), kind) for kind in types]
    mamba, expand = said["mamba_n_heads"], said["mamba_expand"]
    if said["mamba_d_head"] == "auto" and type(mamba) is type(expand) is int and mamba > 0:
        said["mamba_d_head"] = expand * said["hidden_size"] // mamba
    groups, limit = said["num_key_value_heads"], said.get("time_step_limit")
    if isinstance(limit, list) and limit[1:] in ([{"__float__": "Infinity"}], [float("inf")]):
        del said["time_step_limit"]  # the default, which JSON has no number for
    return {
        **said,
        **both_forms(said, 10_000.0),
        "layer_types": types,
        "num_key_value_heads": heads if groups is None else groups,
        "head_dim": said["hidden_size"] // heads,
        "num_local_experts": 0,
        "position_embedding_type": said["position_embedding_type"] or "nope",
    }


def _layer(config: dict[str, Any], number: int) -> Shapes:
    """Attention, or Mamba 2 with its convolution over time."""
    layer, hidden = LAYER.format(layer=number), config["hidden_size"]
    norms = {f"{layer}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    if config["layer_types"][number] == FULL:
        bias = bool(config["attention_bias"])
        own = {**config, "qkv_bias": bias, "o_bias": bias}
        return {**projections(own, f"{layer}self_attn."), **norms}
    state = config["mamba_n_groups"] * config["mamba_d_state"]
    found = mamba(
        f"{layer}mamba.", hidden, config["mamba_n_heads"], config["mamba_expand"] * hidden, state,
        config["mamba_d_conv"], config["mamba_conv_bias"], config["mamba_proj_bias"],
    )  # fmt: skip
    return found | norms


def _is_mixture(config: Mapping[str, Any]) -> bool:
    return bool(config.get("num_local_experts", 8) != 0)


FAMILIES = (
    Family(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        _DEFAULTS,
        multipliers=True,
        layers="granite 4",
        usual={"intermediate_size": "shared_intermediate_size"},
        kinds=(MAMBA, FULL),
        numbers=(
            "mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_head", "mamba_d_conv",
            "mamba_expand",
        ),
        settle=_settle,
        layer=_layer,
        is_mixture=_is_mixture,
        fused={
            "shared_mlp.input_linear": {"mlp.gate_proj": "", "mlp.up_proj": ""},
            "shared_mlp.output_linear": {"mlp.down_proj": ""},
        },
    ),
)  # fmt: skip
