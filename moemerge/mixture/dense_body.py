"""The dense model that has the body of a mixture: its config, and its tensors checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moemerge.architectures import (
    Reading,
    dense_shapes,
    find,
    name_of,
)
from moemerge.checkpoint import (
    Checkpoint,
)
from moemerge.errors import Findings
from moemerge.families import ATTENTION, PARTIAL, most_like, normalise, record_of
from moemerge.mixture.parts import Part

_NEEDED = (
    "hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "rms_norm_eps", "vocab_size",
)  # fmt: skip


_KEPT = (
    "dtype", "original_max_position_embeddings", "pad_token_id", PARTIAL, "rope_parameters",
    "rope_scaling", "torch_dtype",
)  # fmt: skip


def dense_config_of(
    opened: Checkpoint, reading: Reading, inner: int, text: str, findings: Findings
) -> dict[str, Any]:
    """The normalised config of a dense model with the mixture's body; see `normalise`."""
    config, windows = opened.config, _windows(opened.config, reading)
    family = config.get("model_type")
    name = name_of(family)
    text_part = {key: value for key, value in config.items() if key != "wrapper"}
    own_body = reading.dense(text_part, inner) if reading.dense and inner else None
    if own_body and (record := record_of(own_body)) and record.layers != ATTENTION:
        beside = {"wrapper": config["wrapper"]} if "wrapper" in config else {}
        try:
            return {**normalise(own_body), **beside}
        except ValueError as error:
            findings.problem(text, f"config.json: {error}", "repair it")
            return {}
    scaled = name is not None and find(name).HOLDS.multipliers
    record = most_like(opened.tensors, bool(windows.get("sliding_window")), scaled)
    if not inner:
        return {}
    missing = [key for key in _NEEDED if key not in config]
    if not any(key in config for key in ("rope_theta", "rope_parameters")):
        missing.append("rope_theta")
    if missing:
        what = f"config.json does not say {', '.join(missing)}"
        findings.problem(text, what, "write it there as the model has it")
        return {}
    own = {key: config[key] for key in (*record.defaults, "head_dim", *_KEPT) if key in config}
    own |= windows
    if own.get(PARTIAL) is None:
        own[PARTIAL] = reading.turned
    if own.get("head_dim") is None:  # families differ in what they then assume
        own["head_dim"] = _head_dim(opened, config["num_attention_heads"])
    own["attention_bias"] = any(name.endswith("self_attn.o_proj.bias") for name in opened.tensors)
    try:
        return normalise({**own, "model_type": record.name, "intermediate_size": inner})
    except ValueError as error:
        findings.problem(text, f"config.json: {error}", "repair it")
        return {}


def check_body(parts: Iterable[Part], dense: dict[str, Any], text: str, findings: Findings) -> None:
    """Record the body's tensors that are missing or have another shape than config.json says."""
    shapes = {name: at for name, at in dense_shapes(dense).items() if ".mlp." not in name}
    there = {part.name: part.shape for part in parts}
    wrong = [name for name, shape in shapes.items() if there.get(name) != shape]
    if wrong:
        shape, more = there.get(wrong[0]), len(wrong) - 1
        what = f"is {list(shape)}, not {list(shapes[wrong[0]])}" if shape else "is missing"
        fix = "use the weights and the config.json of one and the same model"
        findings.problem(text, f"{wrong[0]} {what}" + f" (and {more} more)" * bool(more), fix)


def _head_dim(opened: Checkpoint, heads: object) -> int | None:
    """The width of a head, from the shape of the first layer's query projection."""
    queries = opened.tensors.get("model.layers.0.self_attn.q_proj.weight")
    if queries is None or type(heads) is not int or heads < 1:
        return None
    return queries.shape[0] // heads if queries.shape else None


def _windows(config: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """Which layers have a sliding window, under the keys of a dense model's config.json."""
    window, types = config.get("sliding_window"), config.get("layer_types")
    if types is not None and not isinstance(types, list):
        return {"layer_types": types}  # which `normalise` refuses
    kinds = reading.windows(config) if window else None
    if kinds is None:
        return {"sliding_window": None, "use_sliding_window": False}
    return {"sliding_window": window, "use_sliding_window": True, "layer_types": kinds}
