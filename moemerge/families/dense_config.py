"""A dense model's config.json with everything said: defaults filled in, rope in both dialects."""

from __future__ import annotations

from typing import Any

from moemerge.families import rope
from moemerge.families.rope import is_number

_COMMON: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "hidden_act": "silu",
    "max_position_embeddings": 2048, "initializer_range": 0.02, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": None,
    "rope_theta": 10000.0,
}  # fmt: skip
_QWEN = {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
    "max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": None,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "mistral": _COMMON | {
        "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": _COMMON | _QWEN,
    "qwen3": _COMMON | _QWEN | {"head_dim": 128},
    "phi3": _COMMON | {
        "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
        "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "eos_token_id": 32000, "pad_token_id": 32000,
    },
    "olmo2": _COMMON | {
        "vocab_size": 50304, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 50279,
        "rms_norm_eps": 1e-5,
    },
    "granite": _COMMON | {
        "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
    },
    "seed_oss": _COMMON | {
        "vocab_size": 155136, "intermediate_size": 27648, "num_hidden_layers": 64,
        "num_attention_heads": 80, "num_key_value_heads": 8, "max_position_embeddings": 524288,
        "pad_token_id": 1, "bos_token_id": 0, "attention_bias": True, "attention_out_bias": False,
        "attention_dropout": 0.1, "residual_dropout": 0.1, "head_dim": 128,
    },
}  # fmt: skip
"""What transformers assumes for a key that a family's config.json leaves out."""

_WHOLE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "head_dim",
)  # fmt: skip
_NUMBERS = (
    "rms_norm_eps", "initializer_range", "attention_dropout", "attention_multiplier",
    "embedding_multiplier", "logits_scaling", "residual_multiplier",
)  # fmt: skip
_FLAGS = (
    "tie_word_embeddings", "attention_bias", "mlp_bias", "attention_out_bias", "use_sliding_window"
)  # fmt: skip
_OLDER = {"attention": "full_attention"}
_LAYER_TYPES = ("full_attention", "sliding_attention")
_QWENS = ("qwen2", "qwen3")
_WINDOWED = ("mistral", "phi3", *_QWENS)
"""The families that read `sliding_window`."""


def normalise(raw: dict[str, Any]) -> dict[str, Any]:
    """The config with its family's defaults, an explicit head_dim, and rope as 4.57 and 5 read it.

    transformers 4 reads `rope_theta` and `rope_scaling`, version 5 `rope_parameters`, which version
    4 ignores without a word; each form is made from whichever is there. `sliding_window` is None
    unless all layers have it; where they differ, `layer_types` tells which. What families call by
    names of their own is said in `qkv_bias`, `o_bias`, `qk_norm` (None, or over each `head`, or the
    `full` width) and `post_norm` (norms after attention and MLP, not before). A phi3 becomes the
    mistral that it is, with `saved_as`. A family that is not in `DEFAULTS` keeps what it says.

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
    for key in (*_NUMBERS, *_FLAGS, "rope_theta", "max_window_layers"):
        if config.get(key) is None and key in DEFAULTS[family]:
            config[key] = DEFAULTS[family][key]
    if isinstance(config.get("layer_types"), list):  # an older name
        config["layer_types"] = [_OLDER.get(str(k), k) for k in config["layer_types"]]
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if config.get("head_dim") is None and type(heads) is type(hidden) is int and heads > 0:
        config["head_dim"] = hidden // heads
    _check_types(config, family)
    _settle_windows(config, family)
    config["dtype"] = config["torch_dtype"] = raw.get("dtype") or raw.get("torch_dtype")
    config.update(rope.settle(config, family))
    config.update(_parts(config, family))
    if family == "phi3":
        config["model_type"], config["saved_as"] = "mistral", "phi3"
    return config


def _settle_windows(config: dict[str, Any], family: str) -> None:
    """One `sliding_window` for all layers, or None; else `layer_types`."""
    layers, types = config["num_hidden_layers"], config.get("layer_types")
    window = config["sliding_window"] or None
    if family not in _WINDOWED or (family in _QWENS and not config["use_sliding_window"]):
        window = None  # transformers' Llama has none, whatever is written
    if family == "phi3":  # whose class does not read them
        types = None
    if family in _QWENS and window and types is None:
        full = min(config["max_window_layers"], layers)
        types = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    kinds = set(types or [])
    if family in _WINDOWED and "sliding_attention" in kinds and window is None:
        raise ValueError("layer_types names sliding_attention, but no sliding_window is in use")
    config["sliding_window"] = None if kinds == {"full_attention"} else window
    if len(kinds) > 1:
        config["layer_types"] = types
    else:  # now said by sliding_window
        config.pop("layer_types", None)
        if family in _QWENS:
            config["use_sliding_window"] = config["sliding_window"] is not None
            config["max_window_layers"] = 0 if config["use_sliding_window"] else layers


def _parts(config: dict[str, Any], family: str) -> dict[str, Any]:
    """What the family's attention is made of, by the same names for all."""
    bias = family in ("llama", "qwen3", "olmo2", "granite", "seed_oss") and config["attention_bias"]
    return {
        "qkv_bias": family == "qwen2" or bias,
        "o_bias": config["attention_out_bias"] if family == "seed_oss" else bias,
        "qk_norm": {"qwen3": "head", "olmo2": "full"}.get(family),
        "post_norm": family == "olmo2",
    }


def _check_types(config: dict[str, Any], family: str) -> None:
    """Refuse what would stop a reader of the output, or the hidden pass on its way."""
    for key in _WHOLE:
        if type(config.get(key)) is not int or config[key] < 1:
            raise ValueError(f"{key} is {config.get(key)!r}, not a positive whole number")
    for key in (key for key in _NUMBERS if key in DEFAULTS[family]):
        if not is_number(config[key]) or not config[key] >= 0:
            raise ValueError(f"{key} is {config[key]!r}, not a number from 0")
    for key in (key for key in _FLAGS if key in DEFAULTS[family]):
        if not isinstance(config[key], bool):
            raise ValueError(f"{key} is {config[key]!r}, not true or false")
    if not isinstance(config["hidden_act"], str):
        raise ValueError(f"hidden_act is {config['hidden_act']!r}, not text")
    window = config["sliding_window"]
    more = config["max_window_layers"] if family in _QWENS else 0
    if window is not None and (type(window) is not int or window < 0):
        raise ValueError(f"sliding_window is {window!r}, not a positive whole number or null")
    if type(more) is not int or more < 0:
        raise ValueError(f"max_window_layers is {more!r}, not a whole number")
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        said = config.get(key)
        ids = said if isinstance(said, list) and key == "eos_token_id" else [said]
        if said is not None and not all(type(one) is int for one in ids):
            raise ValueError(f"{key} is {said!r}, not a whole number or null")
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % groups:
        raise ValueError(f"num_attention_heads is {heads}, no multiple of its {groups} kv heads")
    if config["head_dim"] % 2:
        raise ValueError(f"head_dim is {config['head_dim']}, which rope cannot halve")
    types = config.get("layer_types")
    one_each = isinstance(types, list) and len(types) == config["num_hidden_layers"]
    if types is not None and not (one_each and all(kind in _LAYER_TYPES for kind in types)):
        raise ValueError(f"layer_types is not one of {' or '.join(_LAYER_TYPES)} for each layer")
