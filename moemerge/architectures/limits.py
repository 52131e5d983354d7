"""What an output class holds of a dense model, and what its readers drop."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moemerge.architectures.slots import Mixture
from moemerge.families import ATTENTION, PARTIAL, RECORDS, Family, record_of

_CARRIED = (
    "attention_dropout", "bos_token_id", "eos_token_id", "head_dim", "hidden_act", "hidden_size",
    "initializer_range", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "pad_token_id", "rms_norm_eps", "rope_parameters", "rope_scaling",
    "rope_theta", "sliding_window", "tie_word_embeddings", "vocab_size",
)  # fmt: skip


LLAMA_CPP_ROPE = frozenset({"linear", "yarn", "dynamic"})
"""Kinds of rope in every graph of llama.cpp. `dynamic` is among them because it begins beyond the
trained length, where llama.cpp never goes."""


def common(
    config: dict[str, Any], mixture: Mixture, dtype: str, training: Mapping[str, Any]
) -> dict[str, Any]:
    """The keys of every config.json, with the base's own values, because defaults differ by
    family."""
    rope, trained = config["rope_scaling"] or {}, "original_max_position_embeddings"
    return {
        **{key: config.get(key) for key in _CARRIED},
        **({trained: config[trained]} if rope.get("rope_type") == "longrope" else {}),
        "num_experts_per_tok": mixture.per_token,
        **training,
        **dict(mixture.training),
        **dict(mixture.told),
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def as_said(
    config: dict[str, Any],
    mixture: Mixture,
    dtype: str,
    training: Mapping[str, Any],
    own: Mapping[str, Any],
    name: str,
    classes: tuple[str, str],
    without: Collection[str] = (),
) -> dict[str, Any]:
    """The config.json of a class whose body is another kind's: the base's keys as they are.

    `own` are the class's keys, `without` the base's that it does not have. `classes` are
    transformers' classes for text alone, and with the rest of a model that also sees or hears; in
    that case the keys are inside `text_config`, and the model_type is the name without `_text`.
    """
    kept = (key for key in config["said"] if key not in without)
    text = {
        **{key: config[key] for key in kept},
        **own,
        **training,
        **dict(mixture.training),
        **dict(mixture.told),
        "architectures": [classes[0]],
        "model_type": name,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    wrapper = config.get("wrapper")
    if wrapper is None:
        return text
    outer = {"model_type": name.removesuffix("_text"), "architectures": [classes[1]]}
    outer |= {key: text[key] for key in ("dtype", "torch_dtype", "tie_word_embeddings")}
    del text["architectures"]
    return {**wrapper, **outer, "text_config": text}


@dataclass(frozen=True)
class Holds:
    """The parts of a dense model's body for which a class has a place.

    `qk_norms` are the norms of queries and keys that it may have, as in `Family`. With `post_norm`,
    norms are after attention and MLP, and nowhere else. With `turns_in_part`, rope may turn a part
    of each head; with `interleaved`, it turns neighbours, so it holds only models that do. `layers`
    are the kinds of layers, as in `Family`; the other fields describe attention alone.
    """

    qk_norms: tuple[str | None, ...] = (None,)
    post_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    multipliers: bool = False
    turns_in_part: bool = False
    interleaved: bool = False
    layers: tuple[str, ...] = (ATTENTION,)

    @property
    def families(self) -> tuple[str, ...]:
        """The dense model_types that it computes exactly, as such models usually are."""
        return tuple(name for name, record in RECORDS.items() if self._suits(record))

    def _suits(self, record: Family) -> bool:
        if record.layers != ATTENTION:
            return record.layers in self.layers
        biases = (record.usually(record.qkv_bias), record.usually(record.o_bias))
        return (
            ATTENTION in self.layers
            and not record.body
            and (record.interleaved or not self.interleaved)
            and record.qk_norm in self.qk_norms
            and record.post_norm == self.post_norm
            and (self.multipliers or not record.multipliers)
            and (self.turns_in_part or record.defaults.get(PARTIAL, 1) == 1)
            and all(own or not said for own, said in zip(self._biases, biases, strict=True))
        )

    @property
    def _biases(self) -> tuple[bool, bool]:
        return self.qkv_bias, self.o_bias

    def refusals(self, config: dict[str, Any], name: str) -> Iterator[tuple[str, str]]:
        """Refusals of biases of this dense model for which the class `name` has no place."""
        if (config["qkv_bias"] and not self.qkv_bias) or (config["o_bias"] and not self.o_bias):
            if self.qkv_bias:
                yield f"has a bias on o_proj, which a {name} has no place for", "use another model"
            else:
                what = f"has attention biases, which a {name} has no place for"
                yield what, "a granitemoehybrid could hold it"


def one_kind(config: dict[str, Any], in_part: bool = False) -> Iterator[tuple[str, str]]:
    """Refusals of what no architecture holds: biases in MLPs, attention that differs by layer, and
    partial rotary embeddings unless `in_part`."""
    part, record = config[PARTIAL], record_of(config)
    if part != 1 and record and not record.turns_in_part:
        what = f"says partial_rotary_factor: {part:g}, which programs read differently in a"
        yield f"{what} {record.name}", "use a model that turns whole heads"
    elif part != 1 and not in_part:
        what = f"turns a part of each head (partial_rotary_factor: {part:g})"
        yield what, "a glm4_moe could hold it"
    if config["mlp_bias"]:
        yield "has MLP biases, which no mixture has a place for", "use a model without them"
    if len(set(config.get("layer_types") or ["one"])) > 1:
        yield "mixes kinds of attention by layer (layer_types)", "use a model with one kind"


def no_window(config: dict[str, Any], name: str) -> Iterator[tuple[str, str]]:
    """The refusal of an architecture without sliding windows."""
    if window_of(config):
        yield f"has a sliding window, which a {name} does not know", "a mixtral knows it"


def window_of(config: dict[str, Any]) -> int | None:
    """The sliding window, if it is shorter than the model's context."""
    window: int | None = config["sliding_window"]
    return window if window and window < config["max_position_embeddings"] else None


def no_head_dim(config: dict[str, Any], name: str) -> Iterator[tuple[str, str]]:
    """The refusal of an architecture whose heads divide its width, as transformers 4 checks."""
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        what = f"has head_dim {config['head_dim']}, which a {name} has no place for"
        yield what, "a mixtral or glm4_moe could hold it"


def no_loading(config: dict[str, Any], name: str, *readers: str) -> Iterator[tuple[str, str]]:
    """The caveat of readers that have no attention biases."""
    if config["qkv_bias"] or config["o_bias"]:
        for reader in readers:
            yield reader, f"{reader} cannot load it: its {name} has no attention biases"


def drops_biases(config: dict[str, Any], name: str, *readers: str) -> Iterator[tuple[str, str]]:
    """The caveat of readers that drop some biases, although the file has them."""
    if config["qkv_bias"] or config["o_bias"]:
        for reader in readers:
            what = f"drops attention biases of a {name}: expect other text from it"
            yield reader, f"{reader} {what}"


def other_rope(
    config: dict[str, Any], reader: str, known: Collection[str] = ()
) -> Iterator[tuple[str, str]]:
    """The caveat of a reader that knows few kinds of rope scaling, or none."""
    kind = (config["rope_scaling"] or {}).get("rope_type")
    if kind and kind not in known:
        yield reader, f"{reader} ignores its rope scaling ({kind}): expect other text from it"


def long_factors(config: dict[str, Any], *readers: str) -> Iterator[tuple[str, str]]:
    """The caveat of readers that use longrope's long factors for short sequences too."""
    if (config["rope_scaling"] or {}).get("rope_type") == "longrope":
        for reader in readers:
            what = "takes longrope's long factors at every length: expect other text from it"
            yield reader, f"{reader} {what}"


def lonely(mixture: Mixture, name: str) -> Iterator[tuple[str, str]]:
    """The refusal of a class that scores a group by its best two experts."""
    if mixture.experts < 2:
        what = f"would be one expert alone, and a {name} takes the best two of each group"
        yield what, "list two experts or more, or name another architecture"


def one_alone(mixture: Mixture) -> Iterator[tuple[str, str]]:
    """The caveat of mlx-lm: a single expert a token gets the weight of its sigmoid, not 1."""
    if mixture.per_token == 1:
        yield "mlx-lm", "mlx-lm does not renormalise one expert a token: expect other text from it"


def beyond_window(config: dict[str, Any], *readers: str) -> Iterator[tuple[str, str]]:
    """The caveat of readers that attend to everything."""
    if window := window_of(config):
        for reader in readers:
            yield reader, f"{reader} attends beyond its sliding window ({window} tokens)"
