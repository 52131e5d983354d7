"""SmolLM3: a Llama in which every fourth layer has no positions."""

from __future__ import annotations

from typing import Any

from moemerge.families.family import Family
from moemerge.families.rope import both_forms
from moemerge.families.tensors import Shapes, attention

SLIDING, FULL = "sliding_attention", "full_attention"

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
    "num_attention_heads": 16, "num_key_value_heads": 4, "hidden_act": "silu",
    "max_position_embeddings": 32768, "initializer_range": 0.02, "rms_norm_eps": 1e-6,
    "pad_token_id": 128004, "bos_token_id": 128000, "eos_token_id": 128001,
    "use_sliding_window": False, "sliding_window": None, "no_rope_layers": None,
    "no_rope_layer_interval": 4, "layer_types": None, "attention_bias": False,
    "attention_dropout": 0.0, "mlp_bias": False, "tie_word_embeddings": True,
}  # fmt: skip


def _settle(said: dict[str, Any]) -> dict[str, Any]:
    """Which layers have positions (1) and which have none (0), and the kind of each layer."""
    layers, every = range(said["num_hidden_layers"]), said["no_rope_layer_interval"]
    turned, groups = said["no_rope_layers"], said["num_key_value_heads"]
    if turned is None and type(every) is int and every > 0:
        turned = [int((layer + 1) % every != 0) for layer in layers]
    if not isinstance(turned, list) or len(turned) != len(layers):
        raise ValueError(f"no_rope_layers is {turned!r}, not one number for each layer")
    windowed = said["use_sliding_window"] and said["sliding_window"] is not None
    types = said["layer_types"]
    if types is None:
        types = [SLIDING if windowed and not one else FULL for one in turned]
    heads = said["num_attention_heads"]
    return {
        **said,
        **both_forms(said, 2_000_000.0),
        "no_rope_layers": turned,
        "layer_types": types,
        "num_key_value_heads": heads if groups is None else groups,
        "head_dim": said.get("head_dim") or said["hidden_size"] // heads,
    }


def _layer(config: dict[str, Any], number: int) -> Shapes:
    """A Llama's layer."""
    bias = bool(config["attention_bias"])
    return attention({**config, "qkv_bias": bias, "o_bias": bias}, number)


FAMILIES = (
    Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        _DEFAULTS,
        layers="smollm3",
        kinds=(SLIDING, FULL),
        settle=_settle,
        layer=_layer,
    ),
)
