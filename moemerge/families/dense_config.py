"""A dense model's config.json, made explicit: defaults filled in, rope in both dialects."""

from __future__ import annotations

from typing import Any

from moemerge.families import rope
from moemerge.families.family import ATTENTION, Family
from moemerge.families.rope import PARTIAL, is_number
from moemerge.families.types import RECORDS, record_of

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
_OUTSIDE = ("tie_word_embeddings", "dtype", "torch_dtype")
"""Keys beside `text_config` that count for the language part too."""

_COUNTED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_PARAMETERS = ("rope_parameters", "rope_scaling")
_ABSENT: dict[str, Any] = {
    "qkv_bias": False, "o_bias": False, "qk_norm": None, "post_norm": False, "mlp_bias": False,
    "attention_bias": False, "rope_scaling": None, "rope_parameters": None, "rope_theta": 10000.0,
    "sliding_window": None, "hidden_act": "silu", PARTIAL: 1.0,
}  # fmt: skip
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

    Of a model that also sees or hears, only the language part (`text_config`) is read; the rest of
    its config is `wrapper`. The keys of a family with other kinds of layers are kept as they are:
    `said` lists them, the usual names are added, and rope stays as it is.

    Raises:
        ValueError: a value is not of the type that every reader expects; says which.
    """
    family = raw.get("model_type")
    if not isinstance(family, str):
        raise ValueError(f"model_type is {family!r}, not text")
    if text := _language_part(raw):
        return text
    record = record_of(raw)
    if record is None:
        return dict(raw)
    if record.layers != ATTENTION:
        return _as_said(raw, record)
    config = _settled({**record.defaults, **raw}, record)
    if config["num_key_value_heads"] is None:
        config["num_key_value_heads"] = config["num_attention_heads"]
    for key in (*_NUMBERS, *_FLAGS, "rope_theta", "max_window_layers", PARTIAL):
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


def _language_part(raw: dict[str, Any]) -> dict[str, Any]:
    """The normalised language part of a model that also sees or hears; empty if it is not one."""
    text = raw.get("text_config")
    kind = text.get("model_type") if isinstance(text, dict) else None
    record = RECORDS.get(kind) if isinstance(kind, str) else None
    if record is None or raw["model_type"] not in record.inside or record.is_mixture(text or {}):
        return {}
    shared = {key: raw[key] for key in _OUTSIDE if key in raw}
    return {
        **normalise({**(text or {}), **shared}),
        "wrapper": {key: value for key, value in raw.items() if key != "text_config"},
    }


def _as_said(raw: dict[str, Any], record: Family) -> dict[str, Any]:
    """The config of a family with other kinds of layers than attention; see `normalise`."""
    said = {**record.defaults, **raw}
    for key in _COUNTED:  # `settle` computes with these
        if type(said.get(key)) is not int or said[key] < 1:
            raise ValueError(f"{key} is {said.get(key)!r}, not a positive whole number")
    said = _settled(said, record)
    usual = {key: said[own] for key, own in record.usual.items()}
    config = {**_ABSENT, **said, **usual, "said": tuple(said)}
    for key in (*_WHOLE, *record.numbers):
        if type(config.get(key)) is not int or config[key] < 1:
            own = record.usual.get(key, key)
            raise ValueError(f"{own} is {config.get(key)!r}, not a positive whole number")
    layers, types = config["num_hidden_layers"], config.get("layer_types")
    one_each = isinstance(types, list) and len(types) == layers
    if record.kinds and not (one_each and all(kind in record.kinds for kind in types or ())):
        raise ValueError(f"layer_types is not one of {' or '.join(record.kinds)} for each layer")
    if not isinstance(config["tie_word_embeddings"], bool):
        raise ValueError(
            f"tie_word_embeddings is {config['tie_word_embeddings']!r}, not true or false"
        )
    for key in _PARAMETERS:
        if not isinstance(config.get(key) or {}, dict):
            raise ValueError(f"{key} is {config[key]!r}, not a mapping")
    config["dtype"] = config["torch_dtype"] = raw.get("dtype") or raw.get("torch_dtype")
    return config


def _settled(said: dict[str, Any], record: Family) -> dict[str, Any]:
    """The keys as the family's `settle` makes them explicit.

    Raises:
        ValueError: `settle` says so, or a value has a type with which it cannot compute.
    """
    try:
        return record.settle(said)
    except (TypeError, AttributeError, KeyError, IndexError, ArithmeticError) as error:
        what = "a value is not of the type that its class expects"
        raise ValueError(f"{what} ({type(error).__name__}: {error})") from error


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
