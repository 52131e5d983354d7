"""A dense model's config.json, made explicit: defaults filled in, rope in both dialects."""

from __future__ import annotations

from typing import Any

from moemerge.families import rope
from moemerge.families.records import RECORDS, Family
from moemerge.families.rope import is_number

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


def normalise(raw: dict[str, Any]) -> dict[str, Any]:
    """The config with its family's defaults, an explicit head_dim, and rope as 4.57 and 5 read it.

    transformers 4 reads `rope_theta` and `rope_scaling`. Version 5 reads `rope_parameters`, which
    version 4 ignores. Each form is made from whichever is there. `sliding_window` is None unless
    all layers have a window; if layers differ, `layer_types` says which have one. Keys with
    different names in different families become `qkv_bias`, `o_bias`, `qk_norm` (None, or over each
    `head`, or the `full` width) and `post_norm` (norms after attention and MLP, not before). If a
    family equals another under a different name, `model_type` is that other, and `saved_as` is its
    own name. The config of a family without a record is returned unchanged.

    Raises:
        ValueError: a value is not of the type that every reader expects; says which.
    """
    family = raw.get("model_type")
    if not isinstance(family, str):
        raise ValueError(f"model_type is {family!r}, not text")
    record = RECORDS.get(family)
    if record is None:
        return dict(raw)
    config = {**record.defaults, **raw}
    if config["num_key_value_heads"] is None:
        config["num_key_value_heads"] = config["num_attention_heads"]
    for key in (*_NUMBERS, *_FLAGS, "rope_theta", "max_window_layers"):
        if config.get(key) is None and key in record.defaults:
            config[key] = record.defaults[key]
    if isinstance(config.get("layer_types"), list):  # an older name
        config["layer_types"] = [_OLDER.get(str(k), k) for k in config["layer_types"]]
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if config.get("head_dim") is None and type(heads) is type(hidden) is int and heads > 0:
        config["head_dim"] = hidden // heads
    _check_types(config, record)
    _settle_windows(config, record)
    config["dtype"] = config["torch_dtype"] = raw.get("dtype") or raw.get("torch_dtype")
    config.update(rope.settle(config, record))
    for part, said in (("qkv_bias", record.qkv_bias), ("o_bias", record.o_bias)):
        config[part] = config[said] if isinstance(said, str) else said
    config["qk_norm"], config["post_norm"] = record.qk_norm, record.post_norm
    if record.body:
        config["model_type"], config["saved_as"] = record.body, family
    return config


def _settle_windows(config: dict[str, Any], record: Family) -> None:
    """One `sliding_window` for all layers, or None; otherwise `layer_types`."""
    layers, counted = config["num_hidden_layers"], record.window == "counted"
    types = config.get("layer_types") if record.reads_layer_types else None
    window = config["sliding_window"] or None
    if not record.window or (counted and not config["use_sliding_window"]):
        window = None  # as the class has it, whatever is written
    if counted and window and types is None:
        full = min(config["max_window_layers"], layers)
        types = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    kinds = set(types or [])
    if record.window and "sliding_attention" in kinds and window is None:
        raise ValueError("layer_types names sliding_attention, but no sliding_window is in use")
    config["sliding_window"] = None if kinds == {"full_attention"} else window
    if len(kinds) > 1:
        config["layer_types"] = types
    else:  # now said by sliding_window
        config.pop("layer_types", None)
        if counted:
            config["use_sliding_window"] = config["sliding_window"] is not None
            config["max_window_layers"] = 0 if config["use_sliding_window"] else layers


def _check_types(config: dict[str, Any], record: Family) -> None:
    """Refuse values on which a reader of the output, or the hidden pass, would fail."""
    for key in _WHOLE:
        if type(config.get(key)) is not int or config[key] < 1:
            raise ValueError(f"{key} is {config.get(key)!r}, not a positive whole number")
    for key in (key for key in _NUMBERS if key in record.defaults):
        if not is_number(config[key]) or not config[key] >= 0:
            raise ValueError(f"{key} is {config[key]!r}, not a number from 0")
    for key in (key for key in _FLAGS if key in record.defaults):
        if not isinstance(config[key], bool):
            raise ValueError(f"{key} is {config[key]!r}, not true or false")
    if not isinstance(config["hidden_act"], str):
        raise ValueError(f"hidden_act is {config['hidden_act']!r}, not text")
    window = config["sliding_window"]
    more = config["max_window_layers"] if record.window == "counted" else 0
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
