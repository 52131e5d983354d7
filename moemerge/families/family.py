"""The record of one family of dense models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from moemerge.families.tensors import Shapes, attention, final_norm, one_width

ATTENTION = "attention"
"""The kind of layer that most classes share: attention, norms and an MLP, as in a Llama."""

COMMON: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "hidden_act": "silu",
    "max_position_embeddings": 2048, "initializer_range": 0.02, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": None,
    "rope_theta": 10000.0,
}  # fmt: skip
"""The values that transformers assumes for keys that a Llama's config.json leaves out."""

Config = dict[str, Any]


def _unchanged(config: Config) -> Config:
    return config


def _none(_: Config) -> str:
    return ""


def _never(_: Mapping[str, Any]) -> bool:
    return False


@dataclass(frozen=True)
class Family:
    """A family of dense models, by its model_type, as transformers' class reads a config.json.

    The defaults of these fields are those of a Llama.
    """

    name: str
    causal: str
    """transformers' class with the head, for an extracted expert's config.json."""

    defaults: Mapping[str, Any] = field(default_factory=lambda: COMMON)
    """The values that transformers assumes for keys that config.json leaves out."""

    body: str = ""
    """The family that it equals, tensor by tensor, under another name; see `saved_as`."""

    qkv_bias: bool | str = "attention_bias"
    """Whether queries, keys and values have biases: always, never, or by that key of config.json.
    """

    o_bias: bool | str = "attention_bias"
    """Whether the attention's output has a bias, as in `qkv_bias`."""

    qk_norm: Literal["head", "full"] | None = None
    """Norms of queries and keys: over each head, over the full width, or none."""

    post_norm: bool = False
    """Whether norms are after attention and MLP, not before."""

    multipliers: bool = False
    """Whether embeddings, attention, residuals and logits are multiplied, as in a Granite."""

    interleaved: bool = False
    """Whether rope turns neighbours (values 0 and 1, 2 and 3, ...), not the two halves of a head.
    """

    window: Literal["", "all", "counted"] = ""
    """The layers that have the `sliding_window`: none, all, or those from `max_window_layers` on if
    `use_sliding_window` is true. `layer_types` overrides this."""

    reads_layer_types: bool = True
    """Whether the class reads `layer_types`."""

    ropes: tuple[str, ...] = ()
    """The kinds of rope that it knows; empty for all of transformers'."""

    rope_names: Mapping[str, str] = field(default_factory=dict)
    """Its own names for kinds of rope, with the usual name of each."""

    turns_in_part: bool = False
    """Whether all programs read its `partial_rotary_factor` in the same way."""

    fused: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Its own names for modules of a layer, each with the usual names of its parts.

    A module may hold the rows of several parts, in this order. Each part has the config key whose
    number is its share of the rows; an empty key is one share."""

    layers: str = ATTENTION
    """The kind of its layers. Only a class that names this kind in its `Holds` can hold them; all
    keys of config.json except the `usual` ones are then carried over as they are."""

    usual: Mapping[str, str] = field(default_factory=dict)
    """The usual names of keys of config.json that it names differently, with its own names."""

    kinds: tuple[str, ...] = ()
    """What its `layer_types` may name, if its layers are of another kind than attention."""

    numbers: tuple[str, ...] = ()
    """Further keys of config.json that must be whole numbers from 1."""

    settle: Callable[[Config], Config] = _unchanged
    """Makes explicit what its class computes from config.json; defaults are filled in before."""

    layer: Callable[[Config, int], Shapes] = attention
    """The tensors of a layer without its MLP: names and shapes, by normalised config and number."""

    top: Callable[[Config], Shapes] = final_norm
    """The tensors beside the layers, without embeddings and head."""

    width: Callable[[Config, int], int] = one_width
    """The intermediate size of a layer's MLP; 0 if the layer has none."""

    gated: bool = True
    """Whether MLPs have a gate beside their up projection."""

    in_files: Mapping[str, str] = field(default_factory=dict)
    """What names of tensors begin with in its files, by what the usual names begin with."""

    in_class: Mapping[str, str] = field(default_factory=dict)
    """The same for names in transformers' class, if they differ from the usual ones."""

    is_mixture: Callable[[Mapping[str, Any]], bool] = _never
    """Whether a config.json of this model_type is a mixture's."""

    inside: Mapping[str, str] = field(default_factory=dict)
    """The model_types of models that see or hear, of which this is the language part
    (`text_config`), with transformers' class of each."""

    limit: Callable[[Config], str] = _none
    """Up to where a mixture of this model is exact, in words; empty if everywhere."""

    alike: tuple[str, ...] = ()
    """Families whose models may be experts of it, because their layers compute the same."""

    def saved_as(self, name: str, defaults: Mapping[str, Any], **changes: Any) -> Family:
        """This family under another model_type, with changes to its defaults and fields."""
        defaults = {**self.defaults, **defaults}
        return replace(self, name=name, body=self.name, defaults=defaults, **changes)

    def usually(self, bias: bool | str) -> bool:
        """Whether a model has `qkv_bias` or `o_bias` if config.json does not say."""
        return bool(self.defaults[bias]) if isinstance(bias, str) else bias

    def name_in_files(self, name: str) -> str:
        """A tensor's name in the family's files, by its usual name."""
        return _begun_as(self.in_files, name)

    def name_in_class(self, name: str) -> str:
        """A tensor's name in transformers' class, by its usual name."""
        return _begun_as(self.in_class, name)

    def path(self, module: str) -> str:
        """The family's own name of a module within a layer, such as `mlp` or `mlp.down_proj`."""
        for own, parts in self.fused.items():
            for part in parts:
                if module == part:
                    return own
                if part.startswith(f"{module}."):
                    return own.rpartition(".")[0]
        return module


def _begun_as(beginnings: Mapping[str, str], name: str) -> str:
    own = next((start for start in beginnings if name.startswith(start)), "")
    return beginnings[own] + name.removeprefix(own) if own else name
