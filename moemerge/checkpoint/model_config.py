"""A dense model's config.json with everything said: defaults filled in, rope in both dialects."""

from __future__ import annotations

from typing import Any

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": None,
        "hidden_act": "silu", "max_position_embeddings": 2048, "initializer_range": 0.02,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False,
        "mlp_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "sliding_window": None, "rope_theta": 10000.0,
    },
    "mistral": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "hidden_act": "silu", "max_position_embeddings": 131072, "initializer_range": 0.02,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False,
        "mlp_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "sliding_window": 4096, "rope_theta": 10000.0,
    },
}  # fmt: skip
"""What transformers assumes for a key that a family's config.json leaves out."""


def normalise(raw: dict[str, Any]) -> dict[str, Any]:
    """The config with its family's defaults, an explicit head_dim, and rope as 4.57 and 5 read it.

    transformers 4 reads `rope_theta` and `rope_scaling`, version 5 `rope_parameters`, which version
    4 ignores without a word; each form is made from whichever is there. A family that is not in
    `DEFAULTS` keeps what it says.

    Raises:
        ValueError: a value is not of the type that every reader expects; says which.
    """
    family = raw.get("model_type")
    if not isinstance(family, str):
        raise ValueError(f"model_type is {family!r}, not text")
    config = {**DEFAULTS.get(family, {}), **raw}
    if family not in DEFAULTS:
        return config
    if config["num_key_value_heads"] is None:
        config["num_key_value_heads"] = config["num_attention_heads"]
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads", "num_key_value_heads"):  # fmt: skip
        if type(config[key]) is not int or config[key] < 1:
            raise ValueError(f"{key} is {config[key]!r}, not a positive whole number")
    if config.get("head_dim") is None:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    if type(config["head_dim"]) is not int or config["head_dim"] < 1:
        raise ValueError(f"head_dim is {config['head_dim']!r}, not a positive whole number")
    config["dtype"] = config["torch_dtype"] = raw.get("dtype") or raw.get("torch_dtype")
    config.update(_rope(raw, config["rope_theta"]))
    return config


def _rope(raw: dict[str, Any], default_theta: float) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and `rope_parameters` that say the same.

    As in transformers 5, a `rope_scaling` that is there overrides `rope_parameters`.
    """
    stated = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(stated, dict):
        raise ValueError(f"rope_scaling is {stated!r}, not a mapping")
    theta = stated.get("rope_theta", raw.get("rope_theta", default_theta))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not theta > 0:
        raise ValueError(f"rope_theta is {theta!r}, not a positive number")
    kind = stated.get("rope_type", stated.get("type", "default"))
    rest = {k: v for k, v in stated.items() if k not in ("rope_theta", "rope_type", "type")}
    return {
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"rope_type": kind, **rest},
        "rope_parameters": {"rope_type": kind, "rope_theta": theta, **rest},
    }
