"""One record for each family of dense models: defaults of config.json, parts of its body."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

_COMMON: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "hidden_act": "silu",
    "max_position_embeddings": 2048, "initializer_range": 0.02, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": None,
    "rope_theta": 10000.0,
}  # fmt: skip
_QWEN: dict[str, Any] = _COMMON | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
    "max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": None,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A family of dense models, by its model_type, as transformers' class reads a config.json.

    The defaults of these fields are those of a Llama.
    """

    name: str
    causal: str
    """transformers' class with the head, for an extracted expert's config.json."""

    defaults: Mapping[str, Any] = field(default_factory=lambda: _COMMON)
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
    """Modules of a layer that hold the rows of several modules, in this order. Each has the config
    key whose number is its share of the rows; an empty key is one share."""

    def saved_as(self, name: str, defaults: Mapping[str, Any], **changes: Any) -> Family:
        """This family under another model_type, with changes to its defaults and fields."""
        defaults = {**self.defaults, **defaults}
        return replace(self, name=name, body=self.name, defaults=defaults, **changes)

    def usually(self, bias: bool | str) -> bool:
        """Whether a model has `qkv_bias` or `o_bias` if config.json does not say."""
        return bool(self.defaults[bias]) if isinstance(bias, str) else bias


_LLAMA = Family("llama", "LlamaForCausalLM")
_MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    _COMMON | {
        "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    qkv_bias=False, o_bias=False, window="all",
)  # fmt: skip

_ALL = (
    _LLAMA,
    _MISTRAL,
    Family(
        "qwen2", "Qwen2ForCausalLM", _QWEN, qkv_bias=True, o_bias=False, window="counted",
    ),
    Family(
        "qwen3", "Qwen3ForCausalLM", _QWEN | {"head_dim": 128}, qk_norm="head", window="counted",
    ),
    _MISTRAL.saved_as(
        "phi3",
        {
            "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
            "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
            "num_key_value_heads": None, "rms_norm_eps": 1e-5, "sliding_window": None,
            "eos_token_id": 32000, "pad_token_id": 32000,
        },
        reads_layer_types=False,
        ropes=("default", "longrope"),
        rope_names={"yarn": "longrope"},
        turns_in_part=True,
        fused={
            "self_attn.qkv_proj": {
                "self_attn.q_proj": "num_attention_heads",
                "self_attn.k_proj": "num_key_value_heads",
                "self_attn.v_proj": "num_key_value_heads",
            },
            "mlp.gate_up_proj": {"mlp.gate_proj": "", "mlp.up_proj": ""},
        },
    ),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        _COMMON | {
            "vocab_size": 50304, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 50279,
            "rms_norm_eps": 1e-5,
        },
        qk_norm="full", post_norm=True,
    ),
    Family(
        "granite",
        "GraniteForCausalLM",
        _COMMON | {
            "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
        },
        multipliers=True,
    ),
    Family(
        "seed_oss",
        "SeedOssForCausalLM",
        _COMMON | {
            "vocab_size": 155136, "intermediate_size": 27648, "num_hidden_layers": 64,
            "num_attention_heads": 80, "num_key_value_heads": 8,
            "max_position_embeddings": 524288, "pad_token_id": 1, "bos_token_id": 0,
            "attention_bias": True, "attention_out_bias": False, "attention_dropout": 0.1,
            "residual_dropout": 0.1, "head_dim": 128,
        },
        o_bias="attention_out_bias",
    ),
)  # fmt: skip
RECORDS = {record.name: record for record in _ALL}
"""Every family of which a mixture can be made."""


def most_like(tensors: Collection[str], windows: bool, multipliers: bool) -> Family:
    """The family with such tensors, windows and multipliers; of several, the first."""
    norm, qkv, o, after = (
        any(name.endswith(end) for name in tensors)
        for end in (
            ".q_norm.weight", ".q_proj.bias", ".o_proj.bias", ".post_feedforward_layernorm.weight"
        )
    )  # fmt: skip

    def likeness(record: Family) -> tuple[bool, ...]:  # what weighs most stands first
        biases = record.qkv_bias != record.o_bias or qkv == o
        if isinstance(record.qkv_bias, bool):
            biases = record.qkv_bias == qkv
        return (
            record.multipliers == multipliers,
            (record.qk_norm is not None) == norm,
            record.post_norm == after,
            biases,
            bool(record.window) or not windows,
        )

    return max((one for one in RECORDS.values() if not one.body), key=likeness)
