"""Gemma 4: windows in most layers, norms before and after each part, shared keys and values.

Layers with attention to everything have wider heads. Small models add embeddings for each layer,
and their last layers use earlier layers' keys and values, with MLPs of double width (E2B).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moemerge.families.family import Family
from moemerge.families.names import LAYER, NORM
from moemerge.families.tensors import Shapes

SLIDING, FULL = "sliding_attention", "full_attention"

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262144, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 30,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131072,
    "initializer_range": 0.02, "rms_norm_eps": 1e-6, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": 2, "tie_word_embeddings": True, "rope_parameters": None,
    "attention_bias": False, "attention_dropout": 0.0, "sliding_window": 512, "layer_types": None,
    "final_logit_softcapping": None, "use_bidirectional_attention": None,
    "vocab_size_per_layer_input": 262144, "hidden_size_per_layer_input": 256,
    "attention_k_eq_v": False, "num_kv_shared_layers": 0, "use_double_wide_mlp": False,
    "global_head_dim": 512, "num_global_key_value_heads": None,
}  # fmt: skip
_OVERRIDES = {
    "head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"
}  # fmt: skip
_ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


def _settle(said: dict[str, Any]) -> dict[str, Any]:
    """The kind of each layer; the last one attends to everything."""
    layers, types = said["num_hidden_layers"], said["layer_types"]
    if types is None:
        types = [FULL if (layer + 1) % 6 == 0 else SLIDING for layer in range(layers)]
    if isinstance(types, list) and types:
        types = [*types[:-1], FULL]
    for key in ("hidden_size_per_layer_input", "num_kv_shared_layers"):
        value = said[key] or 0
        if type(value) is not int or value < 0 or (key[0] == "n" and value >= layers):
            raise ValueError(f"{key} is {value!r}, not a whole number that the model has room for")
        said[key] = value
    said = _without_overrides(said, types)
    if said["num_global_key_value_heads"] is None or not said["attention_k_eq_v"]:
        said["num_global_key_value_heads"] = said["num_key_value_heads"]
    return {
        **said,
        "layer_types": types,
        "rope_parameters": said["rope_parameters"] or _ROPE,
        "enable_moe_block": False,
    }


def _without_overrides(said: dict[str, Any], types: Any) -> dict[str, Any]:
    """Without `per_layer_config`, in which transformers saves what two keys say for all layers."""
    own = said.pop("per_layer_config", None)
    if own is None:
        return said
    full = {str(at) for at, kind in enumerate(types or ()) if kind == FULL}
    values = list(own.values()) if isinstance(own, dict) else [own]
    alike = values and all(isinstance(one, dict) and one == values[0] for one in values)
    if not alike or {str(key) for key in own} != full or not {*values[0]} <= _OVERRIDES.keys():
        raise ValueError("per_layer_config is not the same for all layers of full_attention")
    return {**said, **{_OVERRIDES[key]: value for key, value in values[0].items()}}


def _shares(config: dict[str, Any], number: int) -> bool:
    """Whether a layer uses the keys and values of an earlier one."""
    first = config["num_hidden_layers"] - config["num_kv_shared_layers"]
    return bool(config["num_kv_shared_layers"]) and number >= first


def _layer(config: dict[str, Any], number: int) -> Shapes:
    """Attention and norms; a number that scales the layer; what the layer's embedding adds."""
    layer, hidden = LAYER.format(layer=number), config["hidden_size"]
    full = config["layer_types"][number] == FULL
    head = config["global_head_dim" if full else "head_dim"]
    alike = config["attention_k_eq_v"] and full
    heads = config["num_attention_heads"]
    groups = config["num_global_key_value_heads" if alike else "num_key_value_heads"]
    found: Shapes = {
        f"{layer}layer_scalar": (1,),
        f"{layer}self_attn.q_proj.weight": (heads * head, hidden),
        f"{layer}self_attn.q_norm.weight": (head,),
    }
    parts = {"q_proj": heads * head, "o_proj": hidden}
    if not _shares(config, number):
        found[f"{layer}self_attn.k_norm.weight"] = (head,)
        for name in ("k_proj", *([] if alike else ["v_proj"])):
            found[f"{layer}self_attn.{name}.weight"] = (groups * head, hidden)
            parts[name] = groups * head
    found[f"{layer}self_attn.o_proj.weight"] = (hidden, heads * head)
    if config["attention_bias"]:
        found |= {f"{layer}self_attn.{name}.bias": (rows,) for name, rows in parts.items()}
    for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        found[f"{layer}{norm}_layernorm.weight"] = (hidden,)
    if own := config["hidden_size_per_layer_input"]:
        found[f"{layer}per_layer_input_gate.weight"] = (own, hidden)
        found[f"{layer}per_layer_projection.weight"] = (hidden, own)
        found[f"{layer}post_per_layer_input_norm.weight"] = (hidden,)
    return found


def _top(config: dict[str, Any]) -> Shapes:
    """The final norm, and the embeddings of all layers."""
    hidden, own = config["hidden_size"], config["hidden_size_per_layer_input"]
    found: Shapes = {NORM: (hidden,)}
    if own:
        every = config["num_hidden_layers"] * own
        found["model.embed_tokens_per_layer.weight"] = (config["vocab_size_per_layer_input"], every)
        found["model.per_layer_model_projection.weight"] = (every, hidden)
        found["model.per_layer_projection_norm.weight"] = (own,)
    return found


def _width(config: dict[str, Any], number: int) -> int:
    """Double in layers that use earlier keys and values, if config.json says so."""
    double = config["use_double_wide_mlp"] and _shares(config, number)
    width: int = config["intermediate_size"] * (2 if double else 1)
    return width


def _is_mixture(config: Mapping[str, Any]) -> bool:
    return bool(config.get("enable_moe_block"))


FAMILIES = (
    Family(
        "gemma4_text",
        "Gemma4ForCausalLM",
        _DEFAULTS,
        layers="gemma 4",
        usual={"hidden_act": "hidden_activation"},
        kinds=(SLIDING, FULL),
        numbers=("global_head_dim", "num_global_key_value_heads", "vocab_size_per_layer_input"),
        settle=_settle,
        layer=_layer,
        top=_top,
        width=_width,
        is_mixture=_is_mixture,
        inside={"gemma4": "Gemma4ForConditionalGeneration"},
    ),
)
