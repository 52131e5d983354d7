"""Nemotron-H: each layer is Mamba, attention or an MLP, which has no gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moemerge.families.family import Family
from moemerge.families.names import LAYER
from moemerge.families.tensors import Shapes, mamba, projections

PATTERN = "hybrid_override_pattern"
"""A letter for each layer: `M` Mamba, `*` attention, `-` an MLP, `E` a mixture."""

_LETTERS = {
    "linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "mlp": "-",
    "moe": "E",
}  # fmt: skip
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 131072, "hidden_size": 4096, "intermediate_size": 21504, "num_hidden_layers": 1,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 4096, "mlp_hidden_act": "relu2", "mlp_bias": False,
    "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": None,
    "ssm_state_size": 128, "mamba_num_heads": 128, "mamba_head_dim": 64, "n_groups": 8,
    "conv_kernel": 4, "expand": 2, "use_conv_bias": True, "mamba_proj_bias": False,
    "use_bias": False, "layer_norm_epsilon": 1e-5, "initializer_range": 0.02,
}  # fmt: skip
_OLDER = {
    "mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel", "mamba_expand": "expand",
    "mamba_conv_bias": "use_conv_bias", "mamba_chunk_size": "chunk_size",
}  # fmt: skip
_LEFT_OUT = ("layers_block_type", "layer_types", "mtp_layers_block_type", "time_step_limit")


def _pattern(config: Mapping[str, Any]) -> str:
    """The pattern, which transformers 5 saves as a list of words; empty if there is none."""
    said = config.get(PATTERN)
    types = config.get("layers_block_type") or config.get("layer_types")
    if not isinstance(said, str) and isinstance(types, list):
        said = "".join(_LETTERS.get(str(kind), "?") for kind in types)
    return said if isinstance(said, str) else ""


def _settle(said: dict[str, Any]) -> dict[str, Any]:
    """The pattern of layers, and newer names of keys.

    Raises:
        ValueError: the pattern has other letters, or no MLP.
    """
    pattern = _pattern(said)
    if not pattern or not {*pattern} <= {*"M*-"}:
        raise ValueError(f"{PATTERN} is {pattern!r}, not a letter M, * or - for each layer")
    said = {_OLDER.get(key, key): value for key, value in said.items() if key not in _LEFT_OUT}
    return {**said, PATTERN: pattern, "num_hidden_layers": len(pattern)}


def _layer(config: dict[str, Any], number: int) -> Shapes:
    """One norm; attention, or Mamba 2 with its convolution over time; nothing else with an MLP."""
    layer, hidden = LAYER.format(layer=number), config["hidden_size"]
    kind, mixer = config[PATTERN][number], f"{layer}mixer."
    norm: Shapes = {f"{layer}norm.weight": (hidden,)}
    if kind == "-":
        return norm
    if kind == "*":
        bias = bool(config["attention_bias"])
        return norm | projections({**config, "qkv_bias": bias, "o_bias": bias}, mixer)
    heads, state = config["mamba_num_heads"], config["n_groups"] * config["ssm_state_size"]
    found = mamba(
        mixer, hidden, heads, heads * config["mamba_head_dim"], state, config["conv_kernel"],
        config["use_conv_bias"], config["use_bias"],
    )  # fmt: skip
    return norm | found


def _top(config: dict[str, Any]) -> Shapes:
    """The final norm, under its own name."""
    return {"model.norm_f.weight": (config["hidden_size"],)}


def _width(config: dict[str, Any], number: int) -> int:
    """Not every layer has an MLP."""
    return int(config["intermediate_size"]) if config[PATTERN][number] == "-" else 0


def _is_mixture(config: Mapping[str, Any]) -> bool:
    return "E" in _pattern(config)


FAMILIES = (
    Family(
        "nemotron_h",
        "NemotronHForCausalLM",
        _DEFAULTS,
        layers="nemotron h",
        usual={"hidden_act": "mlp_hidden_act", "rms_norm_eps": "layer_norm_epsilon"},
        numbers=(
            "ssm_state_size", "mamba_num_heads", "mamba_head_dim", "n_groups", "conv_kernel",
        ),
        settle=_settle,
        layer=_layer,
        top=_top,
        width=_width,
        gated=False,
        is_mixture=_is_mixture,
        fused={"mixer.up_proj": {"mlp.up_proj": ""}, "mixer.down_proj": {"mlp.down_proj": ""}},
        in_files={"model.embed_tokens.": "backbone.embeddings.", "model.": "backbone."},
        in_class={"model.embed_tokens.": "model.embeddings."},
    ),
)  # fmt: skip
